"""Runs to one HTML page that needs nothing beside it. Needs the extra `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from pulseopt_hf import __version__
from pulseopt_hf.report.charts import VEGA_LITE, Plot
from pulseopt_hf.report.palette import DARK, LIGHT, theme
from pulseopt_hf.report.run_charts import plots_of
from pulseopt_hf.report.run_data import RunData
from pulseopt_hf.report.tables import comparison_table, facts, tables_of_run
from pulseopt_hf.report.wording import status_line

_LONG = 300  # rows, from which on a table is filled when it is opened


def to_html(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """Return the page of one run, or of several with a comparison before them."""
    several = len(runs) > 1
    compared = _named("all", plots_of(runs, names)) if several else []
    sections: list[dict[str, Any]] = [
        {
            "run": run,
            "name": name,
            "status": status_line(run),
            "facts": facts(run),
            "columns": -(-len(facts(run)) // -(-len(facts(run)) // 6)),  # of tiles, in even rows
            "plots": _named(f"run{i}", plots_of([run], [name])),
            "tables": [table._replace(name=f"run{i}-{table.name}") for table in tables_of_run(run)],
        }
        for i, (run, name) in enumerate(zip(runs, names, strict=True), 1)
    ]
    plots = [*compared, *(plot for section in sections for plot in section["plots"])]
    tables = [table for section in sections for table in section["tables"]]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # in the order of keys
    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    data = {
        "themes": [theme(), theme(dark=True)],
        "plots": {plot.name: {"spec": plot.spec(), "columns": plot.columns} for plot in plots},
        "rows": {table.name: table.rows for table in tables if len(table.rows) > _LONG},
    }
    return environment.get_template("page.html.j2").render(
        title=f"{len(runs)} runs compared" if several else names[0],
        version=__version__,
        sections=sections,
        comparison=comparison_table(runs, names) if several else None,
        compared=compared,
        light=LIGHT,
        dark=DARK,
        vega=vega.replace("</script", "<\\/script"),
        data=data,
    )


def _named(prefix: str, plots: Sequence[Plot]) -> list[Plot]:
    return [replace(plot, name=f"{prefix}-{plot.name}") for plot in plots]
