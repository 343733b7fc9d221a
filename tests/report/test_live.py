"""What following a run rests on: a record read as it grows, and the picture of a run."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console

from pulseopt_hf.aees.record_format import FILE_NAME, End
from pulseopt_hf.report.live import Sparkline, picture
from pulseopt_hf.report.record_reader import RecordReader, read_run
from tests.report.conftest import edit_record


def test_only_what_is_new_in_a_record_is_read(long: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(long, tmp_path / "copy"))
    file = folder / FILE_NAME
    *lines, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines) + last[:9])
    reader = RecordReader(folder)
    assert len(reader.read()) == len(lines)
    assert reader.data(time.time()).status != "finished"  # the last line is not whole
    # Were any of it read again, it would be no JSON.
    file.write_bytes(lines[0] + b"x" * (sum(map(len, lines)) - len(lines[0])) + last)
    started = time.process_time()
    ((end, _),) = reader.read()
    run = reader.data(time.time())
    picture(run, 120)
    assert time.process_time() - started < 1.0
    assert end == End(20_000, True)
    assert (run.status, len(run.episodes), reader.replaced) == ("finished", 10_000, 0)


@pytest.mark.parametrize("change", ["shorter", "another"])
def test_a_record_that_was_replaced_is_read_anew(finished: Path, change: str) -> None:
    reader = RecordReader(finished)
    reader.read()
    if change == "shorter":
        edit_record(finished, lambda line: line["kind"] == "head" or line.get("step", 60) < 20)
    else:
        edit_record(finished, lambda line: line.update(time=line["time"] + 1))
    fresh = RecordReader(finished)
    assert reader.read() == fresh.read()
    assert reader.replaced == 1
    assert reader.read() == []
    assert reader.data(0.0) == fresh.data(0.0)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_picture_fits_the_terminal(calibrated: Path, eventful: Path, width: int) -> None:
    for folder in (calibrated, eventful):
        console = Console(file=io.StringIO(), width=width)
        console.print(picture(read_run(folder), width))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert len(lines) > 10
        assert max(map(len, lines)) <= width


def test_a_sparkline_rises_and_falls_with_its_values() -> None:
    def drawn(values: list[float], width: int = 8, encoding: str = "utf-8") -> str:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        console = Console(file=stream, width=width)
        console.print(Sparkline(list(enumerate(values))))
        stream.seek(0)
        return stream.read().rstrip("\n")

    assert drawn([float(i) for i in range(8)]) == "▁▂▃▄▅▆▇█"
    assert drawn([3.0, 1.0, 3.0]) == "█▁█"
    assert drawn([7.0] * 3) == "▁▁▁"
    assert drawn([0.0] * 500 + [1.0] * 500, width=4) == "▁▁██"
    assert drawn([float(i) for i in range(8)], encoding="ascii") == "_.:-=+*#"
