"""Charts as SVG and PNG files. Needs the extra `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from pulseopt_hf.files import write_whole

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])  # that Altair writes


def write_chart(spec: dict[str, Any], file: Path) -> None:
    """Save a chart in the language of Vega-Lite as a file that ends in `.svg` or `.png`."""
    if file.suffix.lower() == ".svg":
        content = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE).encode()
    else:
        content = vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2)
    write_whole(file, content)
