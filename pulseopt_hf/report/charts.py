"""What all charts share: curves over steps, axes, looks, files. Needs the extra `report`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from pulseopt_hf.files import write_whole
from pulseopt_hf.report.palette import CURVES, DASHES, theme
from pulseopt_hf.report.run_data import Series
from pulseopt_hf.report.wording import printable

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])  # that Altair writes
WIDE, NARROW = 720, 320  # pixels of the axes in a file; a page fits them to its own width
_MOST_POINTS = 6000  # of a curve, several for each pixel across
_LONGEST_NAME, _LONGEST_LEGEND = 70, 100  # letters
_ZOOM = {"type": "interval", "encodings": ["x"], "zoom": "wheel![event.shiftKey]"}

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """A plot and what stands round it."""

    name: str  # of files and elements; letters and hyphens
    title: str
    text: str  # what it shows in words, for those who do not see it
    charts: Sequence[Any]  # Altair's, one above the other over the same steps, without their data
    data: Mapping[str, Rows]  # of each dataset that the chart names
    wide: bool = True  # whether it takes the whole width of a page
    legend: Sequence[str] = ()  # what stands in it
    zoomed: Sequence[str] = ()  # names of the views in which dragging and the wheel move the steps
    controls: Sequence[str] = ()  # what a page lets a reader do to the first panel: smooth, log

    @property
    def columns(self) -> int:
        """How many entries of the legend stand beside each other in a wide chart."""
        return max(1, _LONGEST_LEGEND // (4 + max(map(len, self.legend), default=0)))

    def spec(self) -> dict[str, Any]:
        """Return the chart and its data in the language of Vega-Lite; a page adds the looks."""
        zoom = {"name": "zoom", "select": _ZOOM, "bind": "scales", "views": self.zoomed}
        # Zoom and stack are not Altair's: it gives the zoom to several layers of a view, which Vega
        # refuses, and renames the views that are stacked.
        found: dict[str, Any] = {"vconcat": [chart.to_dict() for chart in self.charts]}
        found |= {"spacing": 12, "resolve": {"scale": {"x": "shared"}}}
        for part in found["vconcat"]:
            del part["config"], part["$schema"]
        found = found if len(self.charts) > 1 else found["vconcat"][0]
        params = [zoom] if self.zoomed else []
        return {**found, "params": params, "datasets": self.data, "config": {}}

    def picture(self) -> dict[str, Any]:
        """Return the chart as a file has it: with looks and heading, without hovers."""
        looks = theme()
        looks["legend"] |= {"columns": self.columns, "labelLimit": WIDE // self.columns}
        return {**_still(self.spec()), "config": looks, "title": self.title, "padding": 12}

    def altair_chart(self) -> Any:
        """Return the chart with its data and looks, as a notebook shows it and Altair saves it."""
        looks = theme()
        del looks["legend"]["layout"]  # Vega-Lite knows it, and Altair's check of it does not
        (chart,) = self.charts
        return chart.properties(title=self.title, datasets=dict(self.data), config=looks)


def write_chart(spec: dict[str, Any], file: Path) -> None:
    """Save a chart in the language of Vega-Lite as a file that ends in `.svg` or `.png`."""
    if file.suffix.lower() == ".svg":
        content = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE).encode()
    else:
        content = vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2)
    write_whole(file, content)


@dataclass(frozen=True)
class Panel:
    """Curves over steps that share an axis, by name.

    `dots` marks the points of some. A reader of a page may smooth the others of a panel that is
    `adjustable`.
    """

    title: str
    curves: Mapping[str, Series]
    height: int = 120
    log: bool = False
    dots: Sequence[str] = ()
    adjustable: bool = False


def curves(
    name: str,
    title: str,
    text: str,
    panels: Sequence[Panel],
    *,
    wide: bool = True,
    behind: Plot | None = None,
) -> Plot | None:
    """Draw panels above each other that share the axis of steps and the legend.

    Panels without a point are left out; where all are, there is no plot. `behind` lies behind the
    curves of the first panel.
    """
    panels = [panel for panel in panels if any(panel.curves.values())]
    if not panels:
        return None
    drawn = (plain(name) for panel in panels for name, series in panel.curves.items() if series)
    names = list(dict.fromkeys(drawn))
    dashes = [DASHES[i // len(CURVES) % len(DASHES)] for i in range(len(names))]
    # One curve alone is named by its axis.
    legend = None if names == [panels[0].title] else alt.Legend()
    color = alt.Color("name:N", scale=alt.Scale(domain=names), legend=legend)
    dash = alt.StrokeDash("name:N", scale=alt.Scale(domain=names, range=dashes), legend=legend)
    rows, charts = {} if behind is None else dict(behind.data), []
    for index, panel in enumerate(panels):
        own = rows[f"panel-{index}"] = _rows(panel)
        y = log_axis([row["value"] for row in own]) if panel.log else {"scale": FREE}
        base = alt.Chart(alt.NamedData(f"panel-{index}"), height=panel.height).encode(
            x=step_axis("step:Q", labels=panel is panels[-1]),
            y=alt.Y("value:Q", title=panel.title, **y),
            color=color,
        )
        tips = [alt.Tooltip("name:N", title="curve"), alt.Tooltip("step:Q", format=",")]
        tips.append(
            alt.Tooltip("value:Q", title=panel.title, format=".3e" if panel.log else ".5~g")
        )
        lines = base.mark_line(strokeWidth=1.8).encode(strokeDash=dash)
        layers = [] if behind is None or index > 0 else [*behind.charts]
        layers.append(lines.properties(name=f"curves-{index}"))
        if any("dot" in row for row in own):
            dots = base.transform_filter("datum.dot")
            layers.append(dots.mark_point(filled=True, size=36, opacity=1))
        # Invisible points, for the pointer to find.
        layers.append(base.mark_point(filled=True, size=160, opacity=0).encode(tooltip=tips))
        width = WIDE if wide else NARROW
        charts.append(alt.layer(*layers).properties(width=width, height=panel.height))
    zoomed = [f"curves-{index}" for index in range(len(panels))]
    controls = []
    if panels[0].adjustable:
        is_positive = all(row["value"] > 0 for row in rows["panel-0"])
        controls = ["smooth", "log"] if is_positive else ["smooth"]
    shown = [*([] if behind is None else behind.legend), *names]
    return Plot(name, title, text, charts, rows, wide, shown, zoomed, controls)


def _rows(panel: Panel) -> list[dict[str, Any]]:
    return [
        {"step": step, "value": rounded(value), "name": plain(name)}
        | ({"dot": True} if name in panel.dots or len(series) == 1 else {})
        for name, series in panel.curves.items()
        for step, value in thinned(series)
    ]


FREE = alt.Scale(zero=False)  # from the lowest value to the highest


def step_axis(field: str, *, labels: bool = True) -> alt.X:
    """Return a horizontal axis of steps, which may leave its labels to the chart below."""
    x = alt.X(field, title="step", scale=alt.Scale(nice=False, zero=False, padding=5))
    return x if labels else x.axis(labels=False, ticks=False, title=None)


def log_axis(values: Sequence[float], format: str = "~e") -> dict[str, Any]:
    """Return the settings of a logarithmic axis for the positive ones of these values."""
    values = [value for value in values if value > 0] or [1.0]
    first, last = math.ceil(math.log10(min(values))), math.floor(math.log10(max(values)))
    # Vega's own ticks crowd an axis that has powers of ten, and are needed on others.
    powers = [float(f"1e{power}") for power in range(first, last + 1)]
    ticks: dict[str, Any] = {"values": powers} if len(powers) > 1 else {"tickCount": 4}
    scale = alt.Scale(type="log", nice=False, padding=10)
    return {"scale": scale, "axis": alt.Axis(format=format, **ticks)}


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
    """Write any text so that every kind of chart can hold it, shortened where it is long."""
    text = printable(text)
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def rounded(value: float) -> float:
    """Round to eight figures: rounded once more to be shown, six would be seen to be off."""
    return float(f"{value:.8g}")


def _still(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what only a page can use: points that are not seen, and zoom."""
    found = {key: value for key, value in spec.items() if key != "params"}
    for key in found.keys() & {"layer", "vconcat"}:
        seen = [part for part in found[key] if part.get("mark", {}).get("opacity") != 0]
        found[key] = [_still(part) for part in seen]
    return found
