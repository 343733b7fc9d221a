"""From the cells of a comparison to scores. Standard library only."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pulseopt_hf.errors import UsageError

DIVERGED = 1.5  # excess of a run whose loss is not finite, and the most that any run counts
COARSEST = 4.0  # factor between neighbours of a grid that a parabola is put through
SPAN = 30.0  # base LRs from a thirtieth to thirty times the tuned one count
_RESAMPLES = 4000


@dataclass(frozen=True)
class Score:
    """A method's scores. An excess of 0 is as good as tuned, 1 is nothing learned."""

    method: str
    robustness: float  # mean excess over base LRs within `SPAN` of the tuned one
    low: float  # end of its 95 % interval over seeds, by bootstrap; with one seed equal to it
    high: float  # the other end
    worst: float  # the largest mean over seeds among those base LRs
    harm: float  # excess at the tuned LR
    best: float  # as `robustness`, at each run's best evaluation instead of its last
    metric: float | None  # mean of the recipe's over the same runs, at their last evaluation
    best_metric: float | None  # the same at their best evaluation: that of the lowest loss
    seconds: float  # mean training time relative to static runs
    peak_mib: float  # highest peak memory


@dataclass(frozen=True)
class Scores:
    """Of one task: what was tuned, and a score for each method."""

    tuned: float  # the best static LR, see `tuned_lr`
    loss_before: float  # loss before training, L0
    loss_tuned: float  # lowest loss of a static LR, L*
    metric: str | None  # what the metric is called
    metric_tuned: float | None  # its value there
    scores: list[Score]


def score(results: Sequence[dict[str, Any]]) -> Scores:
    """Score a comparison that holds static runs.

    With L the final loss, L* the best static one (over base LRs, mean over seeds) and L0 the loss
    before training, a cell's excess is (L - L*) / (L0 - L*), at most 1.5. `results` is what
    `run_in_subprocess` returned, for every cell.
    """
    loss_before = fmean(result["loss_before"] for result in results)
    losses = losses_by_lr(results, "static")
    if not losses:
        raise UsageError("A comparison needs static runs to be measured against.")
    best = min(losses, key=losses.__getitem__)
    scale = {"tuned": tuned_lr(losses), "loss_before": loss_before, "loss_tuned": losses[best]}
    if not losses[best] < loss_before:
        raise UsageError("No static run learned anything: try other learning rates, or more steps.")
    static = runs_of(results, "static")
    seconds = fmean(r["seconds"] / r["steps"] for r in static if r["steps"])
    scores = []
    for method in dict.fromkeys(r["cell"]["method"] for r in results):
        own = runs_of(results, method)
        near = [r for r in own if counts(r["cell"]["learning_rate"], scale["tuned"])]
        seeds = [fmean(values) for values in excesses(results, method, "seed", scale).values()]
        by_lr = excesses(results, method, "learning_rate", scale)
        bests = [_best(result) for result in near]
        low, high = interval([seeds])
        scores.append(
            Score(
                method,
                robustness=fmean(seeds),
                low=low,
                high=high,
                worst=max(map(fmean, by_lr.values())),
                harm=fmean(by_lr[best]),
                best=fmean(excess(loss, loss_before, losses[best]) for loss, _ in bests),
                metric=last_metric(near),
                best_metric=mean_of_known(metric for _, metric in bests),
                # Against the steps of a static run: what is paid for in steps is not charged twice.
                seconds=fmean(r["seconds"] / r["cell"]["steps"] for r in own) / seconds,
                peak_mib=max(r["peak_mib"] for r in own),
            )
        )
    metric = last_metric(runs_of(results, "static", best))
    return Scores(**scale, metric=results[0].get("metric"), metric_tuned=metric, scores=scores)


def runs_of(
    results: Sequence[dict[str, Any]], method: str, learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Return a method's results, or those at one base LR, which are one a seed."""
    return [
        result
        for result in results
        if result["cell"]["method"] == method
        and learning_rate in (None, result["cell"]["learning_rate"])
    ]


def losses_by_lr(results: Sequence[dict[str, Any]], method: str) -> dict[float, float]:
    """Return a method's final loss at each base LR, mean over seeds; infinite where one is not."""
    found: dict[float, list[float]] = {}
    for result in runs_of(results, method):
        loss = math.inf if result["loss_after"] is None else result["loss_after"]
        found.setdefault(result["cell"]["learning_rate"], []).append(loss)
    return {rate: fmean(found[rate]) for rate in sorted(found)}


def excesses(
    results: Sequence[dict[str, Any]], method: str, by: str, scale: Mapping[str, Any]
) -> dict[Any, list[float]]:
    """Return a method's excess at the base LRs that count, grouped by `seed` or `learning_rate`.

    `scale` has `tuned`, `loss_before` and `loss_tuned` of the task's `Scores`.
    """
    found: dict[Any, list[float]] = {}
    for result in runs_of(results, method):
        if counts(result["cell"]["learning_rate"], scale["tuned"]):
            value = excess(result["loss_after"], scale["loss_before"], scale["loss_tuned"])
            found.setdefault(result["cell"][by], []).append(value)
    return found


def tuned_lr(losses: Mapping[float, float]) -> float:
    """Return the LR of the lowest loss, between the LRs > 0 of a grid.

    It is the vertex of the parabola through the best LR and its two neighbours, over log LR, or the
    best LR where it has no neighbours within a factor of `COARSEST`, or one diverged.
    """
    best = min(losses, key=lambda lr: losses[lr])
    lower = max((lr for lr in losses if best / COARSEST <= lr < best), default=None)
    upper = min((lr for lr in losses if best < lr <= best * COARSEST), default=None)
    if lower is None or upper is None:
        return best
    left, right = losses[lower] - losses[best], losses[upper] - losses[best]
    if not 0.0 < left + right < math.inf:
        return best
    down, up = math.log(best / lower), math.log(upper / best)
    # Where the slope of the parabola is zero, as a distance from the best LR.
    step = 0.5 * (left * up**2 - right * down**2) / (left * up + right * down)
    return best * math.exp(step)


def excess(loss: float | None, loss_before: float, loss_tuned: float) -> float:
    """Return (L - L*) / (L0 - L*), at most 1.5; a loss of `None` was not finite."""
    if loss is None:
        return DIVERGED
    return min(DIVERGED, (loss - loss_tuned) / (loss_before - loss_tuned))


def interval(tasks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95 % interval over seeds of a mean over tasks, by bootstrap.

    Every task has a value for each of its seeds, which are drawn anew in each task.
    """
    rng = random.Random(0)
    means = sorted(
        fmean(fmean(rng.choices(values, k=len(values))) for values in tasks)
        for _ in range(_RESAMPLES)
    )
    return means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]


def counts(learning_rate: float, tuned: float) -> bool:
    """Whether a base LR lies within `SPAN` of the tuned one, give or take 1 % for rounded grids."""
    return 0.99 / SPAN <= learning_rate / tuned <= SPAN * 1.01


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not `None`, or `None` where all are."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def last_metric(results: Sequence[dict[str, Any]]) -> float | None:
    """Return the mean of the recipe's metric at the end of runs, or `None` where there is none."""
    return mean_of_known(r["evaluations"][-1][2] for r in results if r.get("evaluations"))


def _best(result: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return loss and metric of a run's evaluation with the lowest loss; both may be `None`."""
    evaluations = result.get("evaluations") or []  # runs of earlier releases have none
    known = [(loss, metric) for _, loss, metric in evaluations if loss is not None]
    return min(known, key=lambda pair: pair[0], default=(result["loss_after"], None))
