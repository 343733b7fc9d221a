"""The picture of a comparison: final loss over the base LR, a line for each method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_COLUMNS = 3


def draw(
    tasks: Mapping[str, tuple[Sequence[dict[str, Any]], Mapping[str, Any]]], file: Path
) -> bool:
    """Draw one panel a task and save them as one SVG, where the extra `report` is installed.

    Lines are means over seeds, bars reach from the lowest to the highest, and the dotted line is
    the loss at the tuned base LR. A loss that is not finite, or above the loss before training, is
    drawn as that. A task has its cells as `run_in_subprocess` returned them, and `loss_before` and
    `loss_tuned` as `Scores` has them. The result says whether there is a picture.
    """
    try:
        import altair as alt

        from pulseopt_hf.report.charts import FREE, Plot, log_axis, write_chart
    except ModuleNotFoundError:
        return False
    methods = list(dict.fromkeys(c["cell"]["method"] for cells, _ in tasks.values() for c in cells))
    color = alt.Color("method:N", scale=alt.Scale(domain=methods))
    panels, data = [], {"once": [{"once": True}]}
    for name, (cells, scores) in tasks.items():
        rows = data[name] = list(_points(cells, scores["loss_before"]))
        base = alt.Chart(alt.NamedData(name)).encode(
            x=alt.X("rate:Q", title="base learning rate", **log_axis([r["rate"] for r in rows])),
            y=alt.Y("mean:Q", title="final eval loss", scale=FREE),
            color=color,
        )
        tuned = alt.Chart(alt.NamedData("once"))
        layers = (
            tuned.mark_rule(strokeDash=[2, 2]).encode(y=alt.datum(scores["loss_tuned"])),
            base.mark_line(strokeWidth=1.6, point=True),
            base.mark_rule().encode(y="lowest:Q", y2="highest:Q"),
        )
        panels.append(alt.layer(*layers, title=name).properties(width=230, height=180))
    chart = alt.concat(*panels, columns=_COLUMNS, bounds="flush", spacing=76)
    plot = Plot("compare", "", "", [chart], data, legend=methods)
    write_chart(plot.picture(), file)
    return True


def _points(cells: Sequence[dict[str, Any]], loss_before: float) -> Iterator[dict[str, Any]]:
    losses: dict[tuple[str, float], list[float]] = {}
    for cell in cells:
        loss = cell["loss_after"]
        bounded = loss_before if loss is None else min(loss, loss_before)
        key = cell["cell"]["method"], cell["cell"]["learning_rate"]
        if key[1] > 0:  # a logarithmic axis has no place for 0
            losses.setdefault(key, []).append(bounded)
    for (method, rate), own in losses.items():
        ends = {"lowest": min(own), "mean": sum(own) / len(own), "highest": max(own)}
        yield {"method": method, "rate": rate, **ends}
