"""Print the table of knobs, or with `--write` put it into the README, from the config's metadata.

python benchmarks/knobs_table.py [--write]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from pulseopt_hf import PulseOptConfig

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- knobs: made by `make readme` -->\n", "<!-- end of knobs -->\n"


def knobs_table() -> str:
    """Return one Markdown row a knob: name, default, help text."""
    default = PulseOptConfig()
    rows = [
        f"| `{field.name}` | `{getattr(default, field.name)!r}` | {field.metadata['help']} |"
        for field in dataclasses.fields(PulseOptConfig)
    ]
    return "\n".join(["| knob | default | meaning |", "|---|---|---|", *rows]) + "\n"


def with_table(readme: str) -> str:
    """Return the README's text with the table between its markers."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + knobs_table() + END + rest.split(END)[1]


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(with_table(README.read_text()))
    else:
        print(knobs_table(), end="")
