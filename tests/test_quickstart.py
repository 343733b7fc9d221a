"""The first run that a stranger sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pulseopt_hf import quickstart
from pulseopt_hf.report.record_reader import read_run


def test_the_quickstart_learns_and_says_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    code = quickstart.main(["--max_steps", "60", "--output_dir", str(folder)])
    output = capsys.readouterr().out
    assert code == 0
    state = json.loads((folder / "trainer_state.json").read_text())
    evaluations = [e["eval_loss"] for e in state["log_history"] if "eval_loss" in e]
    assert len(evaluations) >= 4
    assert evaluations[-1] < evaluations[0] - 0.5
    assert output.count("\ntrial ") >= 4
    assert "\nLearning rate calibrated: 5e-05 was set, " in output
    run = read_run(folder)
    assert run.calibrated_lr is not None
    assert run.calibrated_lr > 3e-4
    assert output.count("\nepisode ") == len(run.episodes) >= 5
    assert f"eval loss after training:  {evaluations[-1]:.3f}" in output
    assert str(folder) in output
    for name in ("train_results.json", "eval_results.json", "model.safetensors"):
        assert (folder / name).exists()


def test_the_pretrained_demo_runs_on_the_real_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (quickstart.minilm_folder() / "model.safetensors").stat().st_size > 80e6
    folder = tmp_path / "run"
    quickstart.main(["--task", "order", "--max_steps", "15", "--output_dir", str(folder)])
    results = json.loads((folder / "eval_results.json").read_text())
    assert 0.4 <= results["eval_accuracy"] <= 1.0
    assert "\nepisode " in capsys.readouterr().out
