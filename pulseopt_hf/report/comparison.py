"""Several runs beside each other: overlaid curves and a table. Needs the extra `report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pulseopt_hf.report.arms import shown
from pulseopt_hf.report.data import RunData, Series
from pulseopt_hf.report.drawing import Plot, add_line, log_axis, new_figure
from pulseopt_hf.report.tables import Table, progress

# Apart from each other on light and on dark, for colour-blind eyes too; lines differ in dashes when
# the colours come round again.
_COLORS = ("#2f7fd0", "#d9791a", "#1f9e77", "#b4278c", "#8a6fd8", "#a0892a", "#5b6675", "#c9453d")
_DASHES = ("solid", "dash", "dot", "dashdot")
_MOST_METRICS = 6


def plots_of_runs(runs: Sequence[RunData], names: Sequence[str]) -> list[Plot]:
    """Return the curves of several runs, overlaid."""

    def rate(run: RunData) -> Series:
        return [(step, v) for step, v in run.effective_lrs or run.base_lrs if v > 0]

    found = [
        _overlaid(runs, names, "all-loss", "Training loss", "loss", lambda run: run.loss),
        _overlaid(
            runs, names, "all-eval-loss", "Evaluation loss", "loss", lambda run: run.eval_loss
        ),
        _overlaid(runs, names, "all-learning-rate", "Effective LR", "learning rate", rate),
    ]
    return [plot for plot in found if plot is not None]


def comparison_table(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    """Return a row for each run: what it was, how far it got and what it reached."""
    metrics = sorted({key for run in runs for key in run.metrics})
    metrics.sort(key=lambda key: key != "eval_loss")
    metrics = metrics[:_MOST_METRICS]
    head = ["run", "status", "steps", "LR that was set", "calibrated LR", "episodes"]
    head.append("loss, last tenth")
    rows = []
    for run, name in zip(runs, names, strict=True):
        cells = [
            name,
            run.status,
            progress(run),
            shown(run.base_lr),
            shown(run.calibrated_lr),
            f"{len(run.episodes):,}",
            shown(last_tenth(run.loss)),
        ]
        rows.append(cells + [shown(run.metrics.get(key)) for key in metrics])
    head += [key.removeprefix("eval_").replace("_", " ") + ", evaluated" for key in metrics]
    return Table("comparison", "Comparison", head, rows)


def last_tenth(series: Series) -> float | None:
    """Return the mean of the last tenth of the points, at least one."""
    values = [value for _, value in series]
    if not values:
        return None
    values = values[-max(1, len(values) // 10) :]
    return sum(values) / len(values)


def _overlaid(
    runs: Sequence[RunData],
    names: Sequence[str],
    key: str,
    title: str,
    unit: str,
    series: Callable[[RunData], Series],
) -> Plot | None:
    figure = new_figure(unit)
    rate = unit == "learning rate"
    parts = []
    drawn: Series = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        points = series(run)
        drawn += points
        if points:
            parts.append(f"{name} {shown(points[-1][1])}")
        add_line(
            figure,
            points,
            name,
            _COLORS[index % len(_COLORS)],
            dash=_DASHES[index // len(_COLORS) % len(_DASHES)],
            points=key == "all-eval-loss",
            format=".3e" if rate else ".4f",
        )
    if not parts:
        return None
    if rate:
        figure.update_yaxes(log_axis(value for _, value in drawn))
    return Plot(key, title, f"{title} at the end: {'; '.join(parts)}.", figure)
