"""The command itself, as a process."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pulseopt_hf import __version__
from pulseopt_hf.cli import main
from pulseopt_hf.command_line import COMMANDS
from pulseopt_hf.compare.methods import METHODS
from pulseopt_hf.recipes import catalogue
from tests.cli.processes import command, interrupted
from tests.conftest import run_python
from tests.recipes.tiny import SHARED, assert_same_run, needs_shared, results

Local = Callable[..., list[str]]


def real(name: str, model: str) -> list[str]:
    """Return the words that train on the real data of a GLUE task."""
    files = [f"--{s}_file={SHARED / 'glue' / name / s}.csv" for s in ("train", "validation")]
    words = ["train", f"glue/{name}", "--model_name_or_path", model, *files, "--use_cpu"]
    return [*words, "--output_dir", "run"]


def test_list_and_show_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from pulseopt_hf.cli import main; main(['list']); main(['show', 'glue/sst2'])"
        "; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = run_python("-c", code)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["recipe", "task", "model", "time", "score"]
    groups = done.stdout.split("\n\nlaunch profiles")[0].split("\n\n")[1:]
    listed = [[line.split()[0] for line in group.splitlines()] for group in groups]
    assert [name for group in listed for name in group] == catalogue.names()
    assert [{name.split("/")[0] for name in group} for group in listed] == [
        {folder.name} for folder in sorted(catalogue.folder().iterdir()) if folder.name != "launch"
    ]
    assert "accuracy 92.3" in next(line for line in lines if line.startswith("glue/sst2 "))
    assert "# SST-2: is a sentence" in done.stdout
    assert lines[-1] == "set()"


def test_a_copied_recipe_is_one_to_change_and_validate(tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    assert main(["cp", "glue/rte", str(mine)]) == 0
    assert main(["cp", "glue/rte", str(mine)]) == 2
    capsys.readouterr()
    assert main(["validate", str(mine)]) == 0
    assert capsys.readouterr().out == f"`{mine}`: valid.\n"
    mine.write_text(mine.read_text().replace("max_length", "max_lenght"))
    assert main(["validate", str(mine)]) == 2
    assert "did you mean `max_length`?" in capsys.readouterr().err


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that shows help or the version and exits, and return that."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as done:
            main(list(words))
        assert done.value.code == 0
        return capsys.readouterr().out

    return run


def test_help_names_every_command(shown: Callable[..., str]) -> None:
    said = shown("--help")
    assert all(f"\n    {name} " in said for name in COMMANDS)
    assert shown("--version") == f"pulseopt-hf {__version__}\n"
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("words", [["--help"], ["glue/sst2", "-h"]])
def test_every_command_has_help_of_its_own(name, words, shown):
    said = shown(name, *words)
    assert said.startswith(f"usage: pulseopt-hf {name} ")
    assert COMMANDS[name][1:] in said
    assert ("--lr_candidates" in said) == (name == "train")
    assert ("--resume" in said) == (name == "train")
    assert ("--format" in said) == (name == "plot")


def test_the_help_of_compare_has_every_method(shown: Callable[..., str]) -> None:
    _, methods, _ = re.split(r"^methods:$|^A KEY", shown("compare", "--help"), flags=re.M)
    assert re.findall(r"^  (\w+)", methods, re.M) == list(METHODS)


@needs_shared
def test_real_glue_trains_and_its_output_is_readable_in_a_file(bert: str, work: Path) -> None:
    done = command(*real("cola", bert), "--max_steps", "30")
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    episodes = re.findall(
        r"^episode +\d+  steps +\d+-\d+ +LR x[\d.]+ += \d\.\d+e-\d+  loss [\d.]+ to [\d.]+  "
        r"reward [+-][\d.]+$",
        done.stdout,
        re.MULTILINE,
    )
    assert len(episodes) == 6
    log = (work / "run" / "train.log").read_text().splitlines()
    assert [line for line in done.stdout.splitlines() if line in log] == log
    assert results(work / "run")["eval_samples"] == 1043


def test_quiet_is_quiet(local: Local, work: Path) -> None:
    done = command("train", *local(), "--max_steps", "15", "--quiet", "--output_dir", "run")
    assert done.returncode == 0
    assert "episode" not in done.stdout + done.stderr
    assert (work / "run" / "train.log").read_text().count("episode ") == 3


def test_ctrl_c_saves_a_checkpoint_and_the_run_goes_on_from_it_to_the_same_end(local, work):
    words = ["train", *local(), "--max_steps", "250", "--save_strategy", "no"]
    whole = command(*words, "--quiet", "--output_dir", "whole")
    assert whole.returncode == 0, whole.stderr
    words += ["--output_dir", "run"]
    step, go_on = interrupted(words, work / "run", "episode   2")
    assert "Learning rate calibrated: " in (work / "run" / "train.log").read_text()
    assert go_on == [*words, "--resume"]
    done = command(*go_on)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {Path('run') / f'checkpoint-{step}'}" in done.stdout
    assert_same_run(work / "run", work / "whole")


@pytest.mark.slow
@needs_shared
def test_minilm_learns_sst2_from_the_real_file(work: Path) -> None:
    words = [*real("sst2", "embedded:minilm"), "--max_steps", "400"]
    assert main([*words, "--per_device_train_batch_size", "16"]) == 0
    assert results(work / "run")["eval_accuracy"] >= 0.80
