"""The README's two commands, in a clean clone with nothing installed."""

import json
import os
import re
from pathlib import Path

import pytest

from pulseopt_hf.report.record_reader import read_run
from tests.conftest import run_command

ROOT = Path(__file__).parents[2]


def make(target: str, folder: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    given = [f"{name}={value}" for name, value in variables.items()]
    return run_command("make", target, *given, cwd=folder, env=environment).stdout


def installed_by(target: str) -> list[str]:
    """Return what each `pip install` of a target installs, in their order."""
    plan = run_command("make", "--dry-run", "--always-make", target, cwd=ROOT).stdout
    return re.findall(r"pip install --quiet --constraint constraints.txt (.*)", plan)


def test_the_quickstart_installs_what_it_shows_and_the_tests_the_rest() -> None:
    shown = ["torch", "--editable '.[report]'"]
    assert installed_by("quickstart") == shown
    assert installed_by("test") == [*shown, "--editable '.[dev]'", "--editable '.[deepspeed]'"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_clean_clone_does_its_quickstart_and_collects_its_tests(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run_command("git", "clone", "--quiet", ROOT, clone)
    output = make("quickstart", clone)
    brought = {path.name for path in (clone / ".venv").glob("lib/*/site-packages/*")}
    assert "torch" in brought
    assert brought.isdisjoint({"playwright", "mkdocs", "wandb", "sklearn", "pytest"})
    ours, untouched = re.findall(r": eval loss ([\d.]+)", output.splitlines()[-3])
    assert float(ours) < float(untouched) - 1
    run = clone / "runs" / "quickstart-lm"
    record = read_run(run)
    assert {arm.lr_multiplier for arm in record.arms()} == {0.5, 1.0, 2.0}
    assert len(record.trials) >= 4
    assert (run / "report.html").stat().st_size > 5e5
    assert json.loads((run / "all_results.json").read_text())["eval_loss"] == pytest.approx(
        float(ours), abs=1e-3
    )
    # The whole suite is what continuous integration runs; here a part shows that the command works.
    tested = make("test", clone, TESTS="tests/aees/test_reward.py")
    assert re.search(r"\d+ passed", tested)
