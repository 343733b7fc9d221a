"""`pulseopt-hf find-lr`: real trial steps of a tiny model, and nothing left behind."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pulseopt_hf.aees import calibration
from pulseopt_hf.cli import main
from pulseopt_hf.optim.suggestion import Suggestion
from pulseopt_hf.recipes import find_lr
from pulseopt_hf.report.record_reader import read_run
from tests.cli.processes import ACCELERATE, HERE, command
from tests.recipes.tiny import train


@pytest.fixture
def recipe(local: Callable[..., list[str]]) -> list[str]:
    """Return a recipe and keys for it, whose LR is set far too low.

    An evaluation amid the trials would draw random numbers, and dropout others than without it.
    """
    return [*local("cola"), "--learning_rate", "1e-5", "--eval_strategy", "no"]


def test_the_number_is_the_lr_that_a_run_of_the_same_recipe_then_uses(recipe, work, capsys):
    recipe = [*recipe, "--max_steps", "60"]
    assert main(["find-lr", *recipe]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert list(work.iterdir()) == []
    left = (work.parent / "temporary").iterdir()
    assert [path for path in left if "wandb" not in path.name] == []  # which is imported
    train(recipe[0], work / "run", *recipe[1:])
    run = read_run(work / "run")
    assert run.outcome is not None
    assert run.calibrated_lr is not None
    assert lines[-1] == f"{run.calibrated_lr:.3g}"
    assert run.calibrated_lr > 2 * run.outcome.set_lr
    head, *table = lines[: len(run.trials) + 1]
    assert head.split("  ")[-1] == "one such step"
    assert len(table) > 5
    for number, (row, trial) in enumerate(zip(table, run.trials, strict=True), 1):
        rate = f"{trial.learning_rate:.2e}"
        assert row.split()[:4] == [str(number), rate, *trial.moved()]
    assert table[0].endswith("hardly moves the model")
    assert re.search("is small enough|too far$", table[-1])
    said = " ".join(lines)
    assert f"The {run.outcome.limited_by} are what limits it." in said
    assert f"set `learning_rate: {lines[-1]}` and `calibration: off`" in said


def test_whatever_the_recipe_says_of_folders_trackers_and_the_hub_nothing_is_written(
    recipe: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor do knobs change the number, with which a run without calibration then learns."""
    said = []
    writing = ["--output_dir", "run", "--report_to", "tensorboard", "--save_strategy", "steps"]
    writing += ["--save_steps", "1", "--logging_steps", "1", "--push_to_hub"]
    for more in (writing, ["--lr_candidates", "0.5", "1.0", "--calibration", "off"]):
        assert main(["find-lr", *recipe, *more]) == 0
        said.append(capsys.readouterr().out)
        assert list(work.iterdir()) == []
    assert said[0] == said[1]
    found = said[0].splitlines()[-1]
    words = ["--learning_rate", found, "--calibration", "off", "--logging_steps", "1"]
    train(recipe[0], work / "run", *recipe[1:], *words)
    logs = json.loads((work / "run" / "trainer_state.json").read_text())["log_history"]
    assert logs[0]["learning_rate"] == float(found)


@pytest.mark.parametrize(("name", "magic"), [("lr.svg", b"<svg"), ("lr.PNG", b"\x89PNG")])
def test_the_picture_is_all_that_is_written(recipe, work, name, magic, capsys):
    for _ in range(2):  # it is made anew
        assert main(["find-lr", *recipe, "--plot", name]) == 0
    assert [file.name for file in work.iterdir()] == [name]
    assert (work / name).read_bytes().startswith(magic)
    lines = capsys.readouterr().out.splitlines()
    assert f"The picture is in {name}." in lines
    if name.endswith("svg"):
        picture = (work / name).read_text()
        assert f"found: {lines[-1]}<" in picture
        assert "limited by the " in picture


def test_where_nothing_is_found_it_says_why_and_gives_the_lr_that_is_set(
    recipe, work, monkeypatch, capsys
):
    monkeypatch.setattr(calibration, "MOST_TRIALS", 2)
    assert main(["find-lr", *recipe, "--plot", "lr.svg"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1e-05"
    assert lines[-2].startswith("No learning rate was found: ")
    assert "did not answer to it in 2 trials" in lines[-2]
    assert len([line for line in lines if line.endswith("hardly moves the model")]) == 2
    assert "found:" not in (work / "lr.svg").read_text()


def test_where_no_trial_is_taken_there_is_no_picture(work, monkeypatch, capsys):
    nothing = Suggestion(2e-5, None, [], 2e-5, "the model returns nothing")
    monkeypatch.setattr(find_lr, "_ask", lambda *words: (nothing, True))
    assert main(["find-lr", "glue/cola", "--plot", "lr.svg"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "No trial was taken, so there is no picture.",
        "No learning rate was found: the model returns nothing. This one is set:",
        "2e-05",
    ]
    assert list(work.iterdir()) == []


def test_what_the_length_of_the_run_makes_of_the_limit_is_said(work, monkeypatch, capsys):
    trial = calibration.Trial(1e-4, 3.3, 0.01, own_batch=False, step=1)
    found = Suggestion(2e-4, "outputs", [trial], 2e-5, factor=2.0)
    for factor_for in (None, "the length of the run"):
        suggestion = replace(found, factor_for=factor_for)
        monkeypatch.setattr(find_lr, "_ask", lambda *words, s=suggestion: (s, True))
        assert main(["find-lr", "glue/cola"]) == 0
        said = capsys.readouterr().out
        line = "The learning rate is 2 times what they allow, for the length of the run."
        assert (line in said.splitlines()) == (factor_for is not None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "The recipe comes first: `pulseopt-hf find-lr RECIPE"),
        (["glue/colla"], "did you mean `glue/cola`?"),
        (["glue/cola", "--lerning_rate", "1"], "unknown option `--lerning_rate`"),
        (["glue/cola", "--resume"], "unknown option `--resume`"),
        # Refused before anything is loaded: there is no such data here.
        (["glue/cola", "--plot", "lr.gif"], "`--plot`: lr.gif must end in .svg or .png."),
        (["glue/cola", "--plot", "lr"], "`--plot`: lr must end in .svg or .png."),
        (["glue/cola", "--plot", "no/lr.svg"], "`--plot`: no: there is no such folder."),
        (["glue/cola", "--plot", "../a.svg"], "`--plot`: ../a.svg is a folder; name a file in it."),
        (["glue/cola", "--plot"], "expected one argument"),
        (["quickstart/lm", "--no_do_train"], "`do_train` is off"),
        (["quickstart/lm", "--learning_rate", "0"], "`learning_rate` must be > 0"),
        (["quickstart/lm", "--resume_from_checkpoint", "x"], "starts where a new run does"),
    ],
)
def test_bad_usage_is_one_line(words, says, work, refused):
    (work.parent / "a.svg").mkdir()
    assert says in refused("find-lr", *words)


def test_where_the_extra_is_missing_it_is_named_before_anything_runs(refused, monkeypatch):
    monkeypatch.delitem(sys.modules, "pulseopt_hf.report.charts", raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)
    line = refused("find-lr", "glue/cola", "--plot", "lr.svg")
    assert "`--plot` needs `pip install 'pulseopt-hf[report]'`: import of altair halted" in line


@pytest.mark.slow
def test_under_deepspeed_it_says_what_to_do_instead(work: Path) -> None:
    pytest.importorskip("deepspeed")
    file = work.parent / "zero.json"
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    file.write_text(json.dumps({**dict.fromkeys(sizes, "auto"), "zero_optimization": {"stage": 1}}))
    done = command("find-lr", "quickstart/lm", "--use_cpu", "--deepspeed", str(file))
    assert done.returncode == 2
    assert "Train with calibration='trust_region'" in done.stderr.splitlines()[-1]
    assert list(work.iterdir()) == []


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_find_one_number(recipe, work, monkeypatch):
    monkeypatch.setitem(HERE, "TMPDIR", str(work))
    done = command("find-lr", *recipe, "--plot", "lr.svg", by=ACCELERATE)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert float(lines[-1]) > 2 * 2e-5  # which the recipe sets
    assert lines.count(lines[-1]) == 1
    assert (work / "lr.svg").exists()
    assert not (work / "runs").exists()
