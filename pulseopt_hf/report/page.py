"""Runs to one HTML page that needs nothing beside it. Needs the extra `report`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from pulseopt_hf import __version__
from pulseopt_hf.report.comparison import comparison_table, plots_of_runs
from pulseopt_hf.report.data import RunData
from pulseopt_hf.report.drawing import Plot
from pulseopt_hf.report.figures import plots_of_run
from pulseopt_hf.report.tables import Table, facts, status_line, tables_of_run

GENERATOR = '<meta name="generator" content="pulseopt_hf'
LONG = 300  # rows, from which on a table is made when it is opened
_ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class _Section:
    """What the page shows of one run."""

    title: str
    folder: str
    status: str
    status_line: str
    facts: list[tuple[str, str]]
    plots: list[Plot]
    tables: list[Table]


def to_html(runs: Sequence[RunData]) -> str:
    """Return the page of one run, or of several with a comparison before them.

    Args:
        runs: at least one.
    """
    names = distinct_names(runs)
    sections = [
        _section(run, name, number)
        for number, (run, name) in enumerate(zip(runs, names, strict=True), 1)
    ]
    several = len(runs) > 1
    compared = plots_of_runs(runs, names) if several else []
    plots = compared + [plot for section in sections for plot in section.plots]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.j2").render(
        title=f"{len(runs)} runs compared" if several else names[0],
        version=__version__,
        sections=sections,
        comparison=comparison_table(runs, names) if several else None,
        compared=compared,
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        plotly=Markup(get_plotlyjs()),
        figures=as_script_data({plot.name: _figure(plot) for plot in plots}),
        rows=as_script_data(
            {
                f"run{number}-{table.name}": table.rows
                for number, section in enumerate(sections, 1)
                for table in section.tables
                if len(table.rows) > LONG
            }
        ),
        long=LONG,
    )


def write_page(runs: Sequence[RunData], file: Path) -> None:
    """Write the page, whole or not at all."""
    beside = file.with_name(file.name + ".new")
    # A name may hold half a surrogate pair, which no encoding has.
    content = to_html(runs).encode("utf-8", "replace")
    try:
        beside.write_bytes(content)
        os.replace(beside, file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def distinct_names(runs: Sequence[RunData]) -> list[str]:
    """Return the runs' names, with their folders where names are alike."""
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else f"{run.name} ({run.folder})" for run in runs
    ]


def as_script_data(content: object) -> Markup:
    """Write JSON that may stand inside a `<script>` element, whatever texts are in it."""
    text = json.dumps(content, cls=PlotlyJSONEncoder, separators=(",", ":"))
    # Nothing that HTML could read as the end of the script or as a comment.
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _section(run: RunData, name: str, number: int) -> _Section:
    plots = [replace(plot, name=f"run{number}-{plot.name}") for plot in plots_of_run(run)]
    return _Section(
        title=name,
        folder=str(run.folder),
        status=run.status,
        status_line=status_line(run),
        facts=facts(run),
        plots=plots,
        tables=tables_of_run(run),
    )


def _figure(plot: Plot) -> dict[str, Any]:
    content: dict[str, Any] = plot.figure.to_plotly_json()
    return content


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
