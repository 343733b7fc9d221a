"""Every example runs as a user runs it, and does what it says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
    ).stdout


@pytest.mark.parametrize("name", ["trainer.py", "callback.py"])
def test_a_trainer_example_learns_with_several_arms(name: str, tmp_path: Path) -> None:
    metrics, multipliers = run(name, tmp_path).strip().splitlines()[-2:]
    # ln 2048 = 7.6 before training.
    assert float(re.search(r"'eval_loss': '?([\d.]+)", metrics).group(1)) < 6.5  # type: ignore[union-attr]
    played = ast.literal_eval(multipliers)
    assert len(played) == 12
    assert set(played) == {0.5, 1.0, 2.0}


def test_the_loop_example_prints_its_six_episodes(tmp_path: Path) -> None:
    lines = re.findall(r"lr\S+ +loss [\d.]+ to [\d.]+  reward", run("accelerate_loop.py", tmp_path))
    assert len(lines) == 6
