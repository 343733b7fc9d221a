"""The command itself, as a process."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pulseopt_hf import __version__
from pulseopt_hf.cli import main
from pulseopt_hf.command_line import COMMANDS
from pulseopt_hf.compare.methods import METHODS
from pulseopt_hf.recipes import catalogue
from tests.recipes.tiny import SHARED, assert_same_run, files_of, results

HERE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0", "-m", "pulseopt_hf"]
ALONE = [sys.executable, "-m", "pulseopt_hf"]
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the GLUE files in ../shared/data"
)


def command(*words: str, by: list[str] = ALONE) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*by, *words], capture_output=True, text=True, env=HERE, timeout=280)


@pytest.fixture
def local(bert: str, work: Path) -> list[str]:
    words = ["glue/sst2", "--model_name_or_path", bert, "--use_cpu"]
    return [*words, "--per_device_train_batch_size", "8", *files_of("sst2", work.parent / "data")]


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
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


def test_a_copied_recipe_is_one_to_change_and_validate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    assert main(["cp", "glue/rte", str(mine)]) == 0
    assert main(["cp", "glue/rte", str(mine)]) == 2
    capsys.readouterr()
    assert main(["validate", str(mine)]) == 0
    assert capsys.readouterr().out == f"`{mine}`: valid.\n"
    mine.write_text(mine.read_text().replace("max_length", "max_lenght"))
    done = command("validate", str(mine))
    assert done.returncode == 2
    assert "did you mean `max_length`?" in done.stderr


def shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(["--help"], capsys)
    assert all(f"\n    {name} " in said for name in COMMANDS)
    assert shown(["--version"], capsys) == f"pulseopt-hf {__version__}\n"
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("words", [["--help"], ["glue/sst2", "-h"]])
def test_every_command_has_help_of_its_own(
    name: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = shown([name, *words], capsys)
    assert said.startswith(f"usage: pulseopt-hf {name} ")
    assert COMMANDS[name][1:] in said
    assert ("--lr_candidates" in said) == (name == "train")
    assert ("--resume" in said) == (name == "train")
    assert ("--format" in said) == (name == "plot")


def test_the_help_of_compare_has_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(["compare", "--help"], capsys)
    _, methods, _ = re.split(r"^methods:$|^A KEY", said, flags=re.M)
    assert re.findall(r"^  (\w+)", methods, re.M) == list(METHODS)


@needs_data
@pytest.mark.parametrize(("name", "rows"), [("cola", 1043), ("rte", 277)])
def test_real_glue_trains_and_its_output_is_readable_in_a_file(
    name: str, rows: int, bert: str, work: Path
) -> None:
    done = command(*real(name, bert), "--max_steps", "30")
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
    assert results(work / "run")["eval_samples"] == rows


def test_quiet_is_quiet(local: list[str], work: Path) -> None:
    done = command("train", *local, "--max_steps", "15", "--quiet", "--output_dir", "run")
    assert done.returncode == 0
    assert "episode" not in done.stdout + done.stderr
    assert (work / "run" / "train.log").read_text().count("episode ") == 3


def test_ctrl_c_saves_a_checkpoint_and_the_run_goes_on_from_it_to_the_same_end(
    local: list[str], work: Path
) -> None:
    words = [*local, "--max_steps", "250", "--save_strategy", "no"]
    whole = command("train", *words, "--quiet", "--output_dir", "whole")
    assert whole.returncode == 0, whole.stderr

    process = subprocess.Popen(
        [*ALONE, "train", *words, "--output_dir", "run"],
        env=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = work / "run" / "train.log"
    deadline = time.time() + 120
    while not (log.exists() and "episode   2" in log.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.02)
    assert "Learning rate calibrated: " in log.read_text()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in error
    stopped = re.search(r"Stopped at step (\d+) of 250; checkpoint-(\d+) is saved\.", error)
    assert stopped is not None
    assert stopped[1] == stopped[2]
    # What it says is the whole command, to be pasted.
    go_on = shlex.split(error.splitlines()[-1])
    assert go_on == ["pulseopt-hf", "train", *words, "--output_dir", "run", "--resume"]
    shorter = command("train", *words[:-4], "--output_dir", "run", "--resume")
    assert shorter.returncode == 2
    assert "`max_steps` was 250 in this run and would be -1 now" in shorter.stderr
    done = command(*go_on[1:])
    assert done.returncode == 0, done.stderr
    assert f"going on from {Path('run') / ('checkpoint-' + stopped[1])}" in done.stdout
    assert_same_run(work / "run", work / "whole")


@pytest.mark.distributed
def test_accelerate_launch_runs_a_recipe_on_two_processes(local: list[str], work: Path) -> None:
    words = ["train", *local, "--max_steps", "20", "--save_strategy", "steps", "--save_steps", "10"]
    done = command(*words, by=LAUNCH)
    assert done.returncode == 0, done.stderr
    run = work / "runs" / "glue-sst2"
    assert [path.name for path in (work / "runs").iterdir()] == ["glue-sst2"]
    (record,) = json.loads((run / "run.json").read_text())["commands"]
    assert record["processes"] == 2
    assert done.stdout.count("episode   1 ") == 1
    bad = command(*words, "--train_file", "gone.csv", by=LAUNCH)
    assert bad.stderr.count("gone.csv: there is no such file") == 1


@pytest.mark.slow
@needs_data
def test_minilm_learns_sst2_from_the_real_file(work: Path) -> None:
    words = [*real("sst2", "embedded:minilm"), "--max_steps", "400"]
    assert main([*words, "--per_device_train_batch_size", "16"]) == 0
    assert results(work / "run")["eval_accuracy"] >= 0.80
