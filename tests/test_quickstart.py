"""The first run that a stranger sees."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from pulseopt_hf import quickstart
from pulseopt_hf.aees.left_out import ArmTotals
from pulseopt_hf.embedded import minilm_folder
from pulseopt_hf.report.record_reader import read_run


def test_the_quickstart_shows_what_was_found_earned_and_won_and_each_fact_once(tmp_path, capsys):
    folder = tmp_path / "run"
    code = quickstart.main(["--max_steps", "120", "--output_dir", str(folder)])
    output = capsys.readouterr().out
    assert code == 0
    run = read_run(folder)
    assert run.calibrated_lr is not None
    assert run.calibrated_lr > 3e-4
    assert {arm.lr_multiplier for arm in run.arms()} == {0.5, 1.0, 2.0}
    results = [
        json.loads((where / "eval_results.json").read_text())
        for where in (folder, tmp_path / "run-untouched")
    ]
    ours, untouched = (result["eval_loss"] for result in results)
    assert ours < untouched - 0.5

    found, arms, won, page, after = output.splitlines()[-5:]
    assert found == str(run.outcome)
    assert found.startswith("Learning rate calibrated: 5e-05 was set, ")
    for arm in run.arms():
        assert f"x{arm.lr_multiplier:g} {arm.mean:+.4f} in {arm.plays} episode" in arms
    assert f"After 120 steps: eval loss {ours:.3f}, perplexity " in won
    assert f"With 5e-05 untouched: eval loss {untouched:.3f}, perplexity " in won
    assert won.endswith(f"That is {untouched - ours:.3f} lower.")
    assert str(folder / "report.html") in page
    assert f"{run.calibrated_lr:.3g}" in (folder / "report.html").read_text()
    assert after.startswith("Next: ")

    assert output.count("\ntrial ") == len(run.trials) >= 4
    assert output.count("\nepisode ") == len(run.episodes) >= 5
    losses = re.findall(r"eval loss ([\d.]+)", output)
    assert len(losses) == len(set(losses)) >= 5
    assert output.count("calibrated: ") == 1
    for name in ("train_results.json", "eval_results.json", "model.safetensors"):
        assert (folder / name).exists()


def arm(multiplier: float, mean: float, spread: float, plays: int = 4) -> ArmTotals:
    squares = spread**2 * (plays - 1)
    return ArmTotals(multiplier, 0.0, plays, plays, mean, squares, mean - 1, mean + 1)


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ([arm(1.0, 0.03, 0.01), arm(2.0, 0.02, 0.01)], "No arm earned more than x1, "),
        ([arm(1.0, 0.02, 0.01), arm(2.0, 0.03, 0.01)], "leads x1 by 0.0100, no more than chance"),
        ([arm(1.0, 0.02, 0.01), arm(2.0, 0.05, 0.01)], "x2 leads x1 by 0.0300, more than chance"),
        ([arm(1.0, 0.02, 0.01, 1), arm(2.0, 0.05, 0.01)], "Too few episodes to compare them."),
        ([arm(2.0, 0.05, 0.01)], "Too few episodes to compare them."),
    ],
)
def test_the_line_on_arms_says_what_they_did_not_earn(arms: list[ArmTotals], said: str) -> None:
    assert said in quickstart.earned(arms)
    assert ("chance" in said) == (
        f"({2 * math.hypot(0.005, 0.005):.4f})" in quickstart.earned(arms)
    )


def test_a_run_that_ends_higher_says_so(tmp_path: Path) -> None:
    line = quickstart.won(300, 5e-5, {"eval_loss": 0.75}, {"eval_loss": 0.5})
    assert line == (
        "After 300 steps: eval loss 0.750. With 5e-05 untouched: eval loss 0.500. That is 0.250 "
        "higher."
    )


def test_without_the_extra_the_page_is_one_command_away(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    for name in [name for name in sys.modules if name.startswith("pulseopt_hf.report.")]:
        if name.endswith(("page", "charts")):
            monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "run"
    assert quickstart.main(["--max_steps", "20", "--output_dir", str(folder)]) == 0
    *_, found, _, _, page, _ = capsys.readouterr().out.splitlines()
    assert found == "The learning rate is not calibrated: 5e-05 is used."
    assert "needs `pip install 'pulseopt-hf[report]'`: import of altair halted" in page
    assert not (folder / "report.html").exists()


@pytest.mark.slow
def test_the_pretrained_demo_runs_on_the_real_weights(tmp_path, capsys):
    assert (minilm_folder() / "model.safetensors").stat().st_size > 80e6
    folder = tmp_path / "run"
    quickstart.main(["--task", "order", "--max_steps", "15", "--output_dir", str(folder)])
    results = json.loads((folder / "eval_results.json").read_text())
    assert 0.4 <= results["eval_accuracy"] <= 1.0
    output = capsys.readouterr().out
    assert "\nepisode " in output
    assert f"accuracy {results['eval_accuracy']:.3f}" in output.splitlines()[-3]
