"""Every example runs as a user runs it, and does what it says."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import run_python
from tests.engines.engine import slow

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["trainer.py", slow("callback.py")])
def test_a_trainer_example_learns_with_several_arms(name: str, tmp_path: Path) -> None:
    done = run_python(EXAMPLES / name, cwd=tmp_path)
    assert "Learning rate calibrated: 0.001 was set, " in done.stderr
    metrics, multipliers = done.stdout.strip().splitlines()[-2:]
    # ln 2048 = 7.6 before training.
    assert float(re.search(r"'eval_loss': '?([\d.]+)", metrics).group(1)) < 6.5  # type: ignore[union-attr]
    played = ast.literal_eval(multipliers)
    assert len(played) >= 8  # of ten steps each, once the LR is calibrated
    assert set(played) == {0.5, 1.0, 2.0}


def test_the_learning_rate_is_found_without_training(tmp_path: Path) -> None:
    """For a Trainer that was set to 5e-5, and for a loop that was set to 1e-5."""
    said = run_python(EXAMPLES / "find_learning_rate.py", cwd=tmp_path).stdout
    found = re.findall(r"^(\w+): (\S+), limited by the (?:outputs|weights)$", said, re.M)
    assert [name for name, _ in found] == ["Trainer", "loop"]
    rates = [float(rate) for _, rate in found]
    assert min(rates) > 2e-4
    assert max(rates) < 2 * min(rates)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_loop_example_prints_its_six_episodes(tmp_path: Path) -> None:
    said = run_python(EXAMPLES / "accelerate_loop.py", cwd=tmp_path).stdout
    assert len(re.findall(r"lr\S+ +loss [\d.]+ to [\d.]+  reward", said)) == 6
