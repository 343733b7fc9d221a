"""What all plots share: figures with like axes, curves, texts. Needs the extra `report`."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from pulseopt_hf.report.data import Series

INK, ACCENT, SECOND = "#1f2430", "#0f766e", "#b4278c"
# Roles that the page recolours when it turns dark; see `page.js`.
ROLES = {INK: "ink", ACCENT: "accent", SECOND: "second"}
_MOST_POINTS = 6000  # of a curve, several for each pixel across
_LONGEST_NAME = 70


@dataclass(frozen=True)
class Plot:
    """A plot and what stands round it.

    Attributes:
        name: what files and elements are named after; letters and hyphens.
        title: its heading.
        text: what it shows in words, for those who do not see it.
        figure: the plotly figure.
        wide: whether it takes the whole width of a page.
    """

    name: str
    title: str
    text: str
    figure: go.Figure
    wide: bool = True


def new_figure(y_title: str, x_title: str = "step") -> go.Figure:
    """Return an empty figure with the axes and margins that all share."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=360,
        margin={"l": 64, "r": 16, "t": 36, "b": 52},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        hovermode="x",
        hoverlabel={"align": "left", "namelength": -1},  # `plain` shortens names
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1.01,
            "yanchor": "bottom",
            "itemsizing": "constant",
        },
        xaxis=axis(x_title),
        yaxis=axis(y_title),
    )
    return figure


def add_line(
    figure: go.Figure,
    series: Series,
    name: str,
    color: str,
    *,
    yaxis: str = "y",
    points: bool = False,
    dash: str = "solid",
    format: str = ".4f",
) -> None:
    """Add a curve, if it has a point. `name` may be any text: it is shown as it is."""
    if not series:
        return
    series = thinned(series)
    figure.add_trace(
        go.Scatter(
            x=[step for step, _ in series],
            y=[rounded(value) for _, value in series],
            name=plain(name),
            yaxis=yaxis,
            mode="lines+markers" if points or len(series) == 1 else "lines",
            line={"color": color, "width": 1.8, "dash": dash},
            meta={"role": ROLES.get(color)},
            hovertemplate=f"step %{{x}}<br>%{{y:{format}}}<extra>%{{fullData.name}}</extra>",
        )
    )


def thinned(series: Series, most: int = _MOST_POINTS) -> Series:
    """Return a curve of at most `most` points, the lowest and the highest of each stretch.

    A shorter one is returned as it is. Every peak is kept, so the two look alike.
    """
    if len(series) <= most:
        return series
    stretches = most // 2
    kept: Series = []
    for index in range(stretches):
        start = index * len(series) // stretches
        stretch = series[start : (index + 1) * len(series) // stretches]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def plain(text: str) -> str:
    """Write any text so that plotly shows it as it is, shortened where it is long.

    Plotly reads a small HTML and `%{...}` in names and hovers.
    """
    if len(text) > _LONGEST_NAME:
        text = text[: _LONGEST_NAME - 1] + "…"
    return html.escape(text, quote=False).replace("%", "&#37;")


def axis(title: str) -> dict[str, Any]:
    """Return the settings of an axis."""
    return {
        "title": {"text": title, "standoff": 8},
        "automargin": True,
        "gridcolor": "#e3e6ec",
        "zeroline": False,
        "ticks": "outside",
    }


def log_axis(values: Iterable[float]) -> dict[str, Any]:
    """Return the settings of a logarithmic axis that has ticks, however close the values are.

    Args:
        values: what is drawn, at least one; all positive.
    """
    logs = [math.log10(value) for value in values]
    powers = math.floor(max(logs)) - math.ceil(min(logs)) + 1  # of ten, among the values
    # Between them plotly's own choice crowds the axis, but where there are none it is needed.
    return {"type": "log", "exponentformat": "power", "dtick": 1 if powers > 1 else None}


def rounded(value: float) -> float:
    """Round to eight figures: rounded once more to be shown, six would be seen to be off."""
    return float(f"{value:.8g}")
