"""From the cells of a comparison to scores. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DIVERGED = 1.5  # excess of a run whose loss is not finite, and the most that any run counts
SPAN = 30.0  # base LRs from a thirtieth to thirty times the tuned one count
_RESAMPLES = 4000


@dataclass(frozen=True)
class Score:
    """A method's scores. An excess of 0 is as good as tuned, 1 is nothing learned.

    Attributes:
        method: its name.
        robustness: mean excess over base LRs within `SPAN` of the tuned one.
        low: lower end of its 95 % interval over seeds, by bootstrap; equal to it with one seed.
        high: upper end.
        worst: the largest mean over seeds among those base LRs.
        harm: excess at the tuned LR.
        seconds: mean training time relative to static runs.
        peak_mib: highest peak memory, MiB.
    """

    method: str
    robustness: float
    low: float
    high: float
    worst: float
    harm: float
    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Scores:
    """Of one task: what was tuned, and a score for each method."""

    tuned: float
    loss_before: float
    loss_tuned: float
    scores: list[Score]


def score(results: Sequence[dict[str, Any]]) -> Scores:
    """Score a comparison that holds static runs.

    With L the final loss, L* the best static one (over base LRs, mean over seeds) and L0 the loss
    before training, a cell's excess is (L - L*) / (L0 - L*), at most 1.5.

    Args:
        results: what `run_apart` returned, for every cell.

    Raises:
        ValueError: there is no static run, or none that learned anything.
    """
    loss_before = _mean([r["loss_before"] for r in results])
    static: dict[float, list[float]] = {}
    for result in _of(results, "static"):
        loss = result["loss_after"]
        static.setdefault(result["cell"]["learning_rate"], []).append(
            float("inf") if loss is None else loss
        )
    if not static:
        raise ValueError("A comparison needs static runs to be measured against.")
    tuned = min(static, key=lambda lr: _mean(static[lr]))
    loss_tuned = _mean(static[tuned])
    if not loss_tuned < loss_before:
        raise ValueError("No static run learned anything: try other learning rates, or more steps.")

    def of(result: dict[str, Any]) -> float:
        return excess(result["loss_after"], loss_before, loss_tuned)

    seconds = _mean([r["seconds"] / r["steps"] for r in _of(results, "static") if r["steps"]])
    scores = []
    for method in dict.fromkeys(r["cell"]["method"] for r in results):
        own = _of(results, method)
        near = [r for r in own if counts(r["cell"]["learning_rate"], tuned)]
        by_seed: dict[int, list[float]] = {}
        by_lr: dict[float, list[float]] = {}
        for result in near:
            by_seed.setdefault(result["cell"]["seed"], []).append(of(result))
            by_lr.setdefault(result["cell"]["learning_rate"], []).append(of(result))
        seeds = [_mean(values) for values in by_seed.values()]
        low, high = interval([seeds])
        scores.append(
            Score(
                method,
                robustness=_mean(seeds),
                low=low,
                high=high,
                worst=max(_mean(values) for values in by_lr.values()),
                harm=_mean(by_lr[tuned]),
                # Against the steps of a static run: what is paid for in steps is not charged twice.
                seconds=_mean([r["seconds"] / r["cell"]["steps"] for r in own]) / seconds,
                peak_mib=max(r["peak_mib"] for r in own),
            )
        )
    return Scores(tuned, loss_before, loss_tuned, scores)


def excess(loss: float | None, loss_before: float, loss_tuned: float) -> float:
    """Return (L - L*) / (L0 - L*), at most 1.5; a loss of `None` was not finite."""
    if loss is None:
        return DIVERGED
    return min(DIVERGED, (loss - loss_tuned) / (loss_before - loss_tuned))


def interval(tasks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95 % interval over seeds of a mean over tasks, by bootstrap.

    Args:
        tasks: for every task a value for each of its seeds, which are drawn anew in each.
    """
    rng = random.Random(0)
    means = sorted(
        _mean([_mean(rng.choices(values, k=len(values))) for values in tasks])
        for _ in range(_RESAMPLES)
    )
    return means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]


def counts(learning_rate: float, tuned: float) -> bool:
    """Whether a base LR lies within `SPAN` of the tuned one, give or take 1 % for rounded grids."""
    return 0.99 / SPAN <= learning_rate / tuned <= SPAN * 1.01


def _of(results: Sequence[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [result for result in results if result["cell"]["method"] == method]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
