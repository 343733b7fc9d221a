"""A comparison in words: one sentence, a table that needs no legend, and the table of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pulseopt_hf.compare.methods import METHODS
from pulseopt_hf.compare.scores import Scores, last_metric, losses_by_lr, mean_of_known, runs_of

_LEVEL = 0.0005  # losses this close are said to be alike


def about(seconds: float) -> str:
    """Write roughly how long something takes."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def verdict(results: Sequence[dict[str, Any]], scores: Scores, own_lr: float) -> str:
    """Say in one sentence what a user of `own_lr`, one of the base LRs run, wants to know."""
    names = [row.method for row in scores.scores]
    static = losses_by_lr(results, "static")
    swept = f"a sweep would have found {scores.tuned:.2g}"
    if scores.tuned in (min(static), max(static)):
        swept += f", the {'lowest' if scores.tuned == min(static) else 'highest'} that was tried"
    others = [name for name in names if name != "static"]
    if not others:
        return f"At your learning rate of {own_lr:g} static {_ending(static[own_lr])}; {swept}."
    other = "default" if "default" in others else others[0]
    loss, static_loss = losses_by_lr(results, other)[own_lr], static[own_lr]
    if math.isinf(loss) or math.isinf(static_loss):
        ends = f"{_ending(loss)} and static {_ending(static_loss)}"
    elif abs(loss - static_loss) < _LEVEL:
        ends = "ends where static does"
    else:
        difference = f"{abs(loss - static_loss):.3f}".rstrip("0")
        ends = f"ends {difference} {'lower' if loss < static_loss else 'higher'} than static"
    scale = mean_of_known(run["lr_scale"] for run in runs_of(results, other, own_lr))
    found = "" if scale is None else f"{scale * own_lr:.2g}"
    trained = f": it trained at {found}, which it found, and " if found else "; "
    name = "the default" if other == "default" else f"`{other}`"
    return f"At your learning rate of {own_lr:g} {name} {ends}{trained}{swept}."


def table(
    results: Sequence[dict[str, Any]], scores: Scores, own_lr: float
) -> list[tuple[str, ...]]:
    """Return the rows of a table whose heads say what its figures are: means over seeds."""
    metric = () if scores.metric is None else (f"{scores.metric} from {own_lr:g}",)
    head = (f"final eval loss from {own_lr:g}", "from its best LR", "from its worst LR")
    rows = [("method", *head, *metric, "time", "what it is")]
    untrained = (f"{scores.loss_before:.4f}", "", "", *["" for _ in metric])
    rows.append(("untrained", *untrained, "", "the model before training"))
    for row in scores.scores:
        losses = losses_by_lr(results, row.method)
        best, worst = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
        shown = [_loss(losses[own_lr])]
        shown += [f"{_loss(losses[rate])} ({rate:g})" for rate in (best, worst)]
        if metric:
            shown.append(_shown(last_metric(runs_of(results, row.method, own_lr))))
        rows.append((row.method, *shown, f"{row.seconds:.2f} x", METHODS[row.method].about))
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table in Markdown, the first as its head."""
    head, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others])


def scores_table(recipe: str, steps: int, seeds: int, scores: Scores) -> str:
    """Return the table of scores, best robustness first, with its legend."""
    tuned = "" if scores.metric_tuned is None else f", {scores.metric} {scores.metric_tuned:.4f}"
    best = "at the best evaluation"
    head = ("method", "robustness", "95 %", "worst base LR", "harm", best)
    rows = [(*head, scores.metric or "metric", best, "time", "peak MiB")]
    for row in sorted(scores.scores, key=lambda row: row.robustness):
        interval = f"{row.low:.3f} to {row.high:.3f}"
        losses = (f"{row.worst:.3f}", f"{row.harm:+.3f}", f"{row.best:.3f}")
        metrics = (_shown(row.metric), _shown(row.best_metric))
        cost = (f"{row.seconds:.2f}", f"{row.peak_mib:.0f}")
        rows.append((row.method, f"{row.robustness:.3f}", interval, *losses, *metrics, *cost))
    return (
        f"`{recipe}`, {steps} steps, {seeds} seeds. Eval loss {scores.loss_before:.4f} before "
        f"training, {scores.loss_tuned:.4f} at the tuned base LR of {scores.tuned:.2g}{tuned}.\n\n"
        f"{markdown(rows)}\n\n"
        "Excess is (L - L\\*) / (L0 - L\\*): 0 is as good as tuned, 1 is nothing learned. "
        "Robustness is its mean over base LRs from 1/30 to 30 times the tuned one, harm its value "
        "at the tuned one. The best evaluation is the one with the lowest loss of each run."
    )


def _ending(loss: float) -> str:
    return f"ends at {loss:.4f}" if math.isfinite(loss) else "diverges"


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
