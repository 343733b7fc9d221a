"""The picture of a run in a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pulseopt_hf.report.live import picture, sparkline
from pulseopt_hf.report.record_reader import read_run


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_picture_fits_the_terminal(calibrated: Path, eventful: Path, width: int) -> None:
    for folder in (calibrated, eventful):
        console = Console(file=io.StringIO(), width=width)
        console.print(picture(read_run(folder), console))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert len(lines) > 10
        assert max(map(len, lines)) <= width


def test_a_sparkline_rises_and_falls_with_its_values() -> None:
    def drawn(values: list[float], width: int = 8) -> str:
        return sparkline(list(enumerate(values)), width)

    assert drawn([float(i) for i in range(8)]) == "▁▂▃▄▅▆▇█"
    assert drawn([3.0, 1.0, 3.0]) == "█▁█"
    assert drawn([7.0] * 3) == "▁▁▁"
    assert drawn([0.0] * 500 + [1.0] * 500, width=4) == "▁▁██"


def test_a_terminal_without_blocks_has_a_sparkline_too(calibrated: Path) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    console = Console(file=stream, width=80)
    console.print(picture(read_run(calibrated), console))
    stream.seek(0)
    (line,) = [line for line in stream.read().splitlines() if line.startswith("loss ")]
    assert len(line) > 60
    assert set(line.removeprefix("loss ")) == set("_.:-=+*#")
