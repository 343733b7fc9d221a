"""The README's commands are there, and its scripts run as they stand and end where it says."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_command, run_python

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OURS, VANILLA = re.findall(r"ends\s+at (?:an eval loss of )?about ([\d.]+\d)", README)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_commands_of_the_readme_exist() -> None:
    """That what they install works, tests/packaging shows."""
    lines = [line for block in blocks("bash") for line in block.strip().splitlines()]
    install, *others = [shlex.split(line, comments=True) for line in lines]
    assert install == ["pip", "install", "."]
    assert others == [["make", "quickstart"], ["make", "test"]]
    for command in others:
        run_command("make", "-n", *command[1:], cwd=ROOT)


def test_the_script_runs_pasted_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(blocks("python")[0])
    done = run_python("script.py", cwd=tmp_path)
    assert "Learning rate calibrated: 5e-05 was set, " in done.stderr
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(float(OURS), abs=0.15)


def test_with_trainer_in_its_place_the_script_ends_higher(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = blocks("python")[0].replace("PulseOptTrainer(", "Trainer(")
    exec(f"from transformers import Trainer\n{script}", {})
    loss = float(capsys.readouterr().out.splitlines()[-1])
    assert loss == pytest.approx(float(VANILLA), abs=0.15)
    assert loss > float(OURS) + 0.5


def test_the_other_scripts_go_on_with_the_names_of_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script, find, arms = blocks("python")
    assert len(find.splitlines()) == 3
    assert len(arms.splitlines()) == 5
    names: dict[str, Any] = {}
    exec(script.split("trainer.train()")[0], names)
    exec(find, names)
    assert float(capsys.readouterr().out.splitlines()[-1]) > 1e-3
    assert names["trainer"].state.global_step == 0
    exec(arms, names)
    aees = names["trainer"].aees
    assert aees.calibrator.outcome.learning_rate > 1e-3
    assert set(aees.get_logs()["selected_lr_values"]) == {0.5, 1.0, 2.0}
