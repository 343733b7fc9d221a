"""`pulseopt-hf plot`: the page's plots as files."""

from __future__ import annotations

import io
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pulseopt_hf.cli import main
from pulseopt_hf.report.arms import ArmStyles
from pulseopt_hf.report.figures import plays_plot, plots_of_run
from pulseopt_hf.report.pictures import draw
from pulseopt_hf.report.reading import read_run
from tests.report.conftest import HOSTILE, edit_record

SVG = "{http://www.w3.org/2000/svg}"


def groups(file: Path, name: str) -> list[ElementTree.Element]:
    found = ElementTree.parse(file).iter(f"{SVG}g")
    return [group for group in found if (group.get("id") or "").startswith(name)]


def marks(file: Path) -> int:
    """Count the points of an SVG's scatter plots; a few are drawn as paths of their own."""
    return sum(
        len(list(group.iter(f"{SVG}use"))) or len(list(group.iter(f"{SVG}path")))
        for group in groups(file, "points-")
    )


def test_every_plot_of_the_page_is_a_file(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    assert main(["plot", str(calibrated), "--out", str(out)]) == 0
    run = read_run(calibrated)
    names = [plot.name for plot in plots_of_run(run)]
    assert names == ["loss", "learning-rate", "reward", "plays", "mean-reward", "calibration"]
    written = capsys.readouterr().out.split()
    assert written == [str(out / f"{name}.svg") for name in names]
    assert marks(out / "reward.svg") == len(run.episodes)
    assert marks(out / "calibration.svg") == 2 * len(run.trials) + 1  # the LR that was found
    (strip,) = groups(out / "loss.svg", "episodes")
    assert len(list(strip.iter(f"{SVG}path"))) >= len(run.episodes)
    text = (out / "learning-rate.svg").read_text()
    assert "effective LR" in text
    assert "base LR" in text
    again = tmp_path / "again"
    assert main(["plot", str(calibrated), "--out", str(again)]) == 0
    for name in names:
        assert (again / f"{name}.svg").read_bytes() == (out / f"{name}.svg").read_bytes()


def test_png_is_png_and_lies_in_the_runs_folder_unasked(
    eventful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(eventful), "--format", "png"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {file.parent for file in files} == {eventful / "plots"}
    for file in files:
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert file.stat().st_size > 5000


def test_what_happened_to_episodes_is_marked(eventful: Path, tmp_path: Path) -> None:
    run = read_run(eventful)
    clipped = sum(run.was_clipped(record) for record in run.episodes)
    undone = sum(record.outcome is not None for record in run.episodes)
    skipped = sum(count > 0 for count in run.skips())
    assert min(clipped, undone, skipped) > 0
    assert main(["plot", str(eventful), "--out", str(tmp_path)]) == 0
    file = tmp_path / "reward.svg"
    assert marks(file) == len(run.episodes) + clipped + undone + skipped
    for word in ("clipped", "rolled back", "with skipped steps"):
        assert word in file.read_text()


def test_several_runs_lie_over_each_other_under_names_that_are_text(
    calibrated: Path, eventful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(calibrated), str(eventful)]) == 0
    files = sorted(file.name for file in (tmp_path / "plots").iterdir())
    assert files == ["eval-loss.svg", "learning-rate.svg", "loss.svg"]
    for name in files:
        tree = ElementTree.parse(tmp_path / "plots" / name)
        assert not list(tree.iter(f"{SVG}script"))
    texts = "".join(t for t in tree.getroot().itertext())
    assert re.sub(r"\s", "", HOSTILE)[:20] in re.sub(r"\s", "", texts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required"),
        (["nowhere"], "nowhere"),
        (["RUN", "--format", "gif"], "invalid choice: 'gif'"),
        (["RUN", "--out", "RUN/pulse.jsonl"], "is a file; name a folder"),
        (["RUN", "RUN"], "named twice"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, calibrated: Path, capsys: Any
) -> None:
    assert main(["plot", *(word.replace("RUN", str(calibrated)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("format", ["svg", "png"])
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("$x_1$ and \\$y", "$x_1$ and \\$y"),
        ("_under", "_under"),
        ("\x1b[31m\x00\uffff", "\ufffd[31m\ufffd\ufffd"),
        ("\ud800", "\ufffd"),
        ("日本", "日本"),
    ],
)
def test_a_name_is_shown_as_it_is_where_a_picture_may_hold_it(
    name: str,
    shown: str,
    format: str,
    finished: Path,
    calibrated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_record(finished, lambda line: line["kind"] != "head" or line.update(name=name))
    out = tmp_path / "pictures"
    words = [str(finished), str(calibrated), "--out", str(out), "--format", format]
    assert main(["plot", *words]) == 0
    assert capsys.readouterr().err == ""
    assert len(list(out.iterdir())) == 3
    if format == "svg":
        texts = [t for t in ElementTree.parse(out / "loss.svg").getroot().itertext() if t.strip()]
        assert shown in [text.strip("\u200b") for text in texts]


def test_a_picture_is_written_whole_or_not_at_all(
    finished: Path,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A full disk leaves the picture that is there."""
    assert main(["plot", str(finished), "--out", str(small_disk)]) == 0
    before = {file.name: file.read_bytes() for file in small_disk.iterdir()}
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "full").write_bytes(bytes(free))
    capsys.readouterr()
    assert main(["plot", str(finished), "--out", str(small_disk)]) == 2
    assert "cannot be written: No space left" in capsys.readouterr().err
    (small_disk / "full").unlink()
    assert {file.name: file.read_bytes() for file in small_disk.iterdir()} == before


def test_runs_without_curves_are_refused_and_leave_no_folder(
    finished: Path, calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    for folder in (finished, other):
        edit_record(folder, lambda line: line["kind"] not in ("log", "episode"))
    out = tmp_path / "pictures"
    assert main(["plot", str(finished), str(other), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "logged no loss and no LR" in line
    assert not out.exists()


def test_names_of_arms_do_not_overlap(eventful: Path, calibrated: Path) -> None:
    """Long ones, of arms with noise, are slanted; short ones are not."""
    for folder, slant in ((eventful, 30.0), (calibrated, 0.0)):
        run = read_run(folder)
        plot = plays_plot(run, ArmStyles(run.episodes))
        assert plot is not None
        figure = draw(plot)
        figure.savefig(io.BytesIO(), format="png")
        ticks = figure.axes[0].get_xticklabels()
        assert len(ticks) == len(run.arms()) > 2
        assert {tick.get_rotation() for tick in ticks} == {slant}
        if not slant:
            ends = [tick.get_window_extent() for tick in ticks]
            assert all(one.x1 < other.x0 for one, other in pairwise(ends))


def test_ten_thousand_episodes_make_small_pictures(long: Path, tmp_path: Path) -> None:
    assert main(["plot", str(long), "--out", str(tmp_path)]) == 0
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert len(sizes) == 5
    assert max(sizes.values()) < 3_000_000
