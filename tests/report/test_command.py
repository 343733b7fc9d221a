"""`pulseopt-hf report`: where the page goes, and what is refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf.cli import main
from tests.report.conftest import edit_record


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run `report` with words that must be refused, and return the one line it says."""

    def refused(*words: object) -> str:
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
        capsys.readouterr()
        assert main(["report", *map(str, words)]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("pulseopt-hf: error: ")
        assert captured.out == ""
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
        return line

    return refused


def head_and_logs(run: Path, kinds: tuple[str, ...]) -> None:
    file = run / "pulse.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if json.loads(line)["kind"] in kinds))


def test_the_page_of_one_run_lies_in_its_folder_and_is_made_anew(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["report", str(finished)]) == 0
        assert capsys.readouterr().out == f"{finished / 'report.html'}\n"
    assert (finished / "report.html").read_text().startswith("<!doctype html>")
    assert not (finished / "report.html.new").exists()


def test_half_a_surrogate_pair_does_not_keep_a_page_from_being_written(finished: Path) -> None:
    edit_record(finished, lambda line: line["kind"] != "head" or line.update(name="half \ud800"))
    assert main(["report", str(finished)]) == 0
    assert "<title>half ?" in (finished / "report.html").read_text(encoding="utf-8")


def test_a_folder_whose_name_is_no_utf8_can_be_shown(finished: Path, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff")
    finished.rename(odd)
    command = [sys.executable, "-m", "pulseopt_hf", "report", odd]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(odd, "report.html").exists()


def test_the_page_of_several_runs_lies_in_the_working_folder(
    calibrated: Path, eventful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(calibrated), str(eventful)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_run_that_keeps_no_record_is_refused_and_told_what_keeps_one(
    calibrated: Path, train: Any, tmp_path: Path, say: Callable[..., str]
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 20}
    for name, knobs in (("plain", None), ("neutral", {"calibration": "off", "episode_length": 5})):
        folder = train(tmp_path / name, knobs, **saved)
        assert f"{name}: has no run record (pulse.jsonl)." in say(calibrated, folder)


def test_a_run_with_no_finished_episode_is_refused(finished: Path, say: Callable[..., str]) -> None:
    head_and_logs(finished, ("head", "log"))
    line = say(finished)
    assert "has no finished episode at step 100 of 100" in line
    assert "`logging_steps`" in line
    head_and_logs(finished, ("head",))
    assert "has no finished episode at step 0 of 100" in say(finished)


def test_a_run_in_its_calibration_has_trials_to_show(finished: Path) -> None:
    head_and_logs(finished, ("head", "log", "trial"))
    assert main(["report", str(finished)]) == 0


def test_what_is_no_run_is_refused(finished: Path, tmp_path: Path, say: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: has no run record" in say(finished, tmp_path / "empty")
    assert "A run was named twice" in say(finished, finished)


def test_an_invalid_path_is_refused(
    finished: Path, tmp_path: Path, say: Callable[..., str]
) -> None:
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    assert "is a folder; name a file in it" in say(finished, "--out", tmp_path)
    assert "there is no such folder" in say(finished, "--out", tmp_path / "no" / "page.html")
    line = say(finished, "--out", tmp_path / "mine.html")
    assert "exists already and was not written by this command" in line
    assert (tmp_path / "mine.html").read_text() == "<html>mine</html>"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: RUN"),
        (["run", "--out"], "expected one argument"),
        (["run", "--ou", "x"], "unrecognized arguments: --ou"),
    ],
)
def test_bad_words_are_refused(words: list[str], says: str, say: Callable[..., str]) -> None:
    line = say(*words)
    assert says in line
    assert "`pulseopt-hf report --help` shows how to use it" in line


@pytest.mark.parametrize("package", ["altair", "vl_convert", "jinja2"])
def test_where_the_extra_is_missing_it_is_named(finished: Path, package: str) -> None:
    """In a process of its own, which finds no such package."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from pulseopt_hf.cli import main\n"
        f"sys.exit(main(['report', {str(finished)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert package in line
    assert "pip install 'pulseopt-hf[report]'" in line
    assert not (finished / "report.html").exists()


def test_json_in_a_script_cannot_end_it(finished: Path, calibrated: Path, tmp_path: Path) -> None:
    name = '</script><!--<script>&amp;\u2028quote"'
    edit_record(finished, lambda line: line["kind"] != "head" or line.update(name=name))
    file = tmp_path / "both.html"
    assert main(["report", str(finished), str(calibrated), "--out", str(file)]) == 0
    _, _, rest = file.read_text().partition('<script type="application/json" id="data">')
    text, end, _ = rest.partition("</script>\n<script>")
    assert end
    assert "<" not in text
    assert ">" not in text
    assert "\u2028" not in text
    rows = json.loads(text)["plots"]["all-loss"]["spec"]["datasets"]["panel-0"]
    assert {row["name"] for row in rows} == {name.replace("\u2028", "\ufffd"), "calibrated"}
