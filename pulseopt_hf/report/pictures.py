"""The page's plots as PNG or SVG files, by matplotlib. Needs the extra `report`.

The figures are those of the page: they are read trace by trace, so that a file shows what the page
shows. `_draw` knows the kinds of trace that this package makes, and refuses others.
"""

from __future__ import annotations

import html
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from pulseopt_hf.report.comparison import plots_of_runs
from pulseopt_hf.report.data import RunData
from pulseopt_hf.report.drawing import Plot
from pulseopt_hf.report.figures import plots_of_run
from pulseopt_hf.report.wording import printable

FORMATS = ("svg", "png")
_WIDE, _NARROW = (7.2, 3.4), (4.2, 3.4)  # inches
_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_SYMBOLS = {
    "circle": "o",
    "diamond": "D",
    "square": "s",
    "star": "*",
    "triangle-up-open": "^",
    "square-open": "s",
    "x-thin-open": "x",
    "diamond-open": "D",
}
_LONGEST_TICKS = 30  # letters that stand side by side below a narrow picture
_STYLE: Any = {
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "pulseopt_hf",  # equal pictures are equal files
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_pictures(
    runs: Sequence[RunData], names: Sequence[str], folder: Path, format: str
) -> list[Path]:
    """Save the plots of one run, or the overlaid ones of several, each file whole or not at all.

    Args:
        runs: the runs.
        names: what to call each.
        folder: where the files go; made if it is not there.
        format: one of `FORMATS`.

    Returns:
        The files, in the page's order; none where the runs have nothing to show together.

    Raises:
        OSError: a file cannot be written.
    """
    plots = plots_of_run(runs[0]) if len(runs) == 1 else plots_of_runs(runs, names)
    if not plots:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for plot in plots:
        files.append(folder / f"{plot.name.removeprefix('all-')}.{format}")
        write_picture(plot, files[-1])
    return files


def write_picture(plot: Plot, file: Path) -> None:
    """Save one plot, whole or not at all.

    Args:
        plot: the plot.
        file: where to; its ending is one of `FORMATS`.

    Raises:
        OSError: the file cannot be written.
    """
    format = file.suffix.lower().removeprefix(".")
    beside = file.with_name(file.name + ".new")
    extra: dict[str, Any] = {"metadata": {"Date": None}} if format == "svg" else {}
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A letter that matplotlib's font lacks: an SVG has it as text, a PNG shows a box.
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        try:
            draw(plot).savefig(beside, format=format, dpi=160, **extra)
            os.replace(beside, file)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def draw(plot: Plot) -> Figure:
    """Draw one plot of the page with matplotlib."""
    figure = Figure(figsize=_WIDE if plot.wide else _NARROW, layout="constrained")
    axes: Any = figure.subplots()
    layout = plot.figure.layout
    # Where a strip of episodes lies behind the curves, they have the second axis.
    y_axis = layout["yaxis2"] if "yaxis2" in layout else layout.yaxis
    for axis, name in ((layout.xaxis, "x"), (y_axis, "y")):
        getattr(axes, f"set_{name}label")(axis.title.text)
        if axis.type == "log":
            getattr(axes, f"set_{name}scale")("log")
    # Curves set the limits of the axes, which a strip behind them has to leave alone.
    for trace in sorted(plot.figure.data, key=lambda trace: trace.type == "heatmap"):
        _draw(axes, trace)
    for shape in layout.shapes:
        style = {"color": shape.line.color, "linewidth": shape.line.width / 1.5, "zorder": 1}
        style["linestyle"] = _DASHES[shape.line.dash or "solid"]
        if shape.x0 == shape.x1:
            axes.axvline(shape.x0, **style)
        else:
            axes.axhline(shape.y0, **style)
    if sum(len(label) for label in _arms(plot)) > _LONGEST_TICKS:
        axes.tick_params("x", rotation=30, rotation_mode="anchor")
        for tick in axes.get_xticklabels():
            tick.set_horizontalalignment("right")
    axes.grid(alpha=0.25)
    axes.set_title(plot.title, loc="left", fontsize=11)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    return figure


def _arms(plot: Plot) -> Sequence[str]:
    """Return what stands below the axis of a plot that has a place for each arm."""
    layout = plot.figure.layout
    return plot.figure.data[0].x if layout.xaxis.type == "category" else ()


def _draw(axes: Any, trace: Any) -> None:
    if trace.type == "heatmap":
        _strip(axes, trace)
    elif trace.type == "bar":
        axes.bar(trace.x, trace.y, color=trace.marker.color)
    elif trace.type == "scatter":
        _scatter(axes, trace)
    else:
        raise TypeError(f"A trace of type {trace.type!r} has no picture yet.")


def _scatter(axes: Any, trace: Any) -> None:
    label = None
    if trace.name and trace.showlegend is not False:
        # A run may be called `$x$`, which is no formula, or begin with `_`, which would hide it.
        # Control characters may not stand in an SVG, and no font has half a surrogate pair.
        label = printable(html.unescape(trace.name)).replace("$", r"\$")
        label = f"\u200b{label}" if label.startswith("_") else label
    y = [float("nan") if value is None else value for value in trace.y or [None]]
    if trace.mode == "none":
        return
    if "lines" in trace.mode:
        style = {"color": trace.line.color, "linestyle": _DASHES[trace.line.dash or "solid"]}
        marker = "o" if "markers" in trace.mode else None
        axes.plot(trace.x, y, label=label, linewidth=1.3, marker=marker, markersize=4, **style)
        return
    symbol = trace.marker.symbol or "circle"
    color = trace.marker.color
    if trace.error_y.array is not None:
        axes.errorbar(
            trace.x, y, yerr=trace.error_y.array, fmt="none", ecolor=trace.error_y.color, capsize=4
        )
    is_open = symbol.endswith("-open") and _SYMBOLS[symbol] != "x"
    axes.scatter(
        trace.x,
        y,
        s=(trace.marker.size / 1.5) ** 2,
        marker=_SYMBOLS[symbol],
        facecolors="none" if is_open else color,
        edgecolors=color if is_open else None,
        alpha=trace.marker.opacity,
        label=label,
        gid=f"points-{len(axes.collections)}",
        zorder=3,
    )


def _strip(axes: Any, trace: Any) -> None:
    """Shade the episodes over the whole height, behind the curves."""
    colors = [color for _, color in trace.colorscale[::2]]
    cells = [float("nan") if cell is None else cell for cell in trace.z[0]]
    limits = axes.get_ylim()
    axes.pcolormesh(
        trace.x,
        [0.0, 1.0],
        [cells],
        cmap=ListedColormap(colors),
        vmin=trace.zmin,
        vmax=trace.zmax,
        alpha=trace.opacity,
        transform=axes.get_xaxis_transform(),
        rasterized=len(cells) > 500,
        zorder=0,
        gid="episodes",
    )
    axes.set_ylim(limits)
