"""The README's two commands, in a clean clone with nothing installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from pulseopt_hf.report.record_reader import read_run

ROOT = Path(__file__).parents[2]


def make(target: str, folder: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return subprocess.run(
        ["make", target, *(f"{name}={value}" for name, value in variables.items())],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    ).stdout


def installed_by(target: str) -> list[str]:
    """Return what each `pip install` of a target installs, in their order."""
    plan = subprocess.run(
        ["make", "--dry-run", "--always-make", target],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout
    return re.findall(r"pip install --quiet --constraint constraints.txt (.*)", plan)


def test_the_quickstart_installs_the_package_alone_and_the_tests_the_rest() -> None:
    assert installed_by("quickstart") == ["torch", "--editable ."]
    tested = ["torch", "--editable .", "--editable '.[dev]'", "--editable '.[deepspeed]'"]
    assert installed_by("test") == tested


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_clean_clone_does_its_quickstart_and_collects_its_tests(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    output = make("quickstart", clone)
    brought = {path.name for path in (clone / ".venv").glob("lib/*/site-packages/*")}
    assert "torch" in brought
    assert brought.isdisjoint({"playwright", "mkdocs", "wandb", "sklearn", "pytest", "altair"})
    before, after = re.findall(r"eval loss (?:before|after) training: +([\d.]+)", output)
    assert float(after) < float(before) - 2
    run = clone / "runs" / "quickstart-lm"
    record = read_run(run)
    assert len(record.episodes) == 10
    assert len(record.trials) >= 4
    assert json.loads((run / "all_results.json").read_text())["eval_loss"] == pytest.approx(
        float(after), abs=1e-3
    )
    # The whole suite is what continuous integration runs; here a part shows that the command works.
    tested = make("test", clone, TESTS="tests/aees/test_reward.py")
    assert re.search(r"\d+ passed", tested)
