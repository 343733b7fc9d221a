"""The charts of what was logged over steps, of one run or of several. Needs the extra `report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pulseopt_hf.report.charts import Panel, Plot, curves
from pulseopt_hf.report.run_charts import plots_of_run
from pulseopt_hf.report.run_data import RunData, Series
from pulseopt_hf.report.tables import MOST_METRICS
from pulseopt_hf.report.wording import course, metric_name


def plots_of(runs: Sequence[RunData], names: Sequence[str]) -> list[Plot]:
    """Return the plots that one run has data for, or the curves of several over each other."""
    one = len(runs) == 1

    def panel(title: str, height: int, series: Callable[[RunData], Series]) -> Panel:
        own = {title if one else n: series(r) for n, r in zip(names, runs, strict=True)}
        dots = own if title in metrics.values() else ()
        return Panel(title, own, height, title == "learning rate", tuple(dots))

    def logged(key: str, title: str, height: int) -> Panel:
        return panel(title, height, lambda run: run.series(key))

    metrics = {key: metric_name(key) for run in runs for key in run.metrics}
    others = [logged(key, name, 110) for key, name in metrics.items() if key != "eval_loss"]
    found = [
        curves("metrics", "Metrics", _told(others), others[:MOST_METRICS]),
        _alone("gradient-norm", logged("grad_norm", "gradient norm", 180), wide=not one),
        _alone("throughput", panel("steps per second", 180, lambda run: run.speed), wide=not one),
    ]
    if not one:
        both = [
            panel("training loss", 240, lambda run: run.loss),
            panel("learning rate", 120, lambda run: run.effective_lrs or run.base_lrs),
        ]
        loss = curves("loss", "Training loss and learning rate", _told(both), both)
        found = [loss, _alone("eval-loss", logged("eval_loss", "evaluation loss", 240)), *found]
    return [*(plots_of_run(runs[0]) if one else []), *(plot for plot in found if plot is not None)]


def _alone(name: str, panel: Panel, *, wide: bool = True) -> Plot | None:
    return curves(name, panel.title.capitalize(), _told([panel]), [panel], wide=wide)


def _told(panels: Sequence[Panel]) -> str:
    """Say in words what the curves did."""
    said = []
    for panel in panels:
        told = [course(name, series) for name, series in panel.curves.items() if series]
        alone = list(panel.curves) == [panel.title]
        said += [f"{'' if alone else panel.title + ': '}{'; '.join(told)}"] if told else []
    return ". ".join(text[0].upper() + text[1:] for text in said) + "."
