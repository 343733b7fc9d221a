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
from tests.recipes.tiny import SHARED, files_of, results

HERE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the GLUE files in ../shared/data"
)


def command(*words: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pulseopt_hf", *words],
        capture_output=True,
        text=True,
        env=HERE,
        timeout=280,
        **kwargs,  # type: ignore[call-overload]
    )


def local(bert: str, folder: Path, *more: str) -> list[str]:
    return [
        *("glue/sst2", "--model_name_or_path", bert, "--use_cpu"),
        *("--per_device_train_batch_size", "8", *files_of("sst2", folder), *more),
    ]


def test_list_and_show_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from pulseopt_hf.cli import main; main(['list']); main(['show', 'glue/sst2'])"
        "; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["recipe", "task", "model", "time", "score"]
    assert [line.split()[0] for line in lines[1 : len(catalogue.names()) + 1]] == catalogue.names()
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
@pytest.mark.parametrize("name", ["cola", "rte"])
def test_real_glue_trains_and_its_output_is_readable_in_a_file(
    name: str, bert: str, tmp_path: Path
) -> None:
    folder = SHARED / "glue" / name
    done = command(
        *("train", f"glue/{name}", "--model_name_or_path", bert, "--max_steps", "30"),
        *("--train_file", str(folder / "train.csv"), "--use_cpu"),
        *("--validation_file", str(folder / "validation.csv"), "--output_dir", "run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    episodes = re.findall(
        r"^episode +\d+  steps +\d+-\d+ +LR x[\d.]+ += \d\.\d+e-\d+  loss [\d.]+ to [\d.]+  "
        r"reward [+-][\d.]+$",
        done.stdout,
        re.MULTILINE,
    )
    assert len(episodes) == 6
    log = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert [line for line in done.stdout.splitlines() if line in log] == log
    assert results(tmp_path / "run")["eval_samples"] == {"cola": 1043, "rte": 277}[name]


def test_quiet_is_quiet(bert: str, tmp_path: Path) -> None:
    words = local(bert, tmp_path, "--max_steps", "15", "--quiet", "--output_dir", "run")
    done = command("train", *words, cwd=tmp_path)
    assert done.returncode == 0
    assert "episode" not in done.stdout + done.stderr
    assert (tmp_path / "run" / "train.log").read_text().count("episode ") == 3


def test_ctrl_c_saves_a_checkpoint_and_the_run_goes_on_from_it_to_the_same_end(
    bert: str, tmp_path: Path
) -> None:
    words = local(bert, tmp_path, "--max_steps", "250", "--save_strategy", "no")
    whole = command("train", *words, "--quiet", "--output_dir", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr

    process = subprocess.Popen(
        [sys.executable, "-m", "pulseopt_hf", "train", *words, "--output_dir", "run"],
        cwd=tmp_path,
        env=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "train.log"
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
    shorter = command("train", *words[:-4], "--output_dir", "run", "--resume", cwd=tmp_path)
    assert shorter.returncode == 2
    assert "`max_steps` was 250 in this run and would be -1 now" in shorter.stderr
    done = command(*go_on[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on from {Path('run') / ('checkpoint-' + stopped[1])}" in done.stdout
    for name in ("model.safetensors", "episodes.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.distributed
def test_accelerate_launch_runs_a_recipe_on_two_processes(bert: str, tmp_path: Path) -> None:
    words = local(bert, tmp_path, "--max_steps", "20", "--save_strategy", "steps")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "pulseopt_hf", "train"]
    done = subprocess.run(
        [*launch, *words, "--save_steps", "10"],
        cwd=tmp_path,
        env=HERE,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "glue-sst2"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["glue-sst2"]
    (record,) = json.loads((run / "run.json").read_text())["commands"]
    assert record["processes"] == 2
    assert done.stdout.count("episode   1 ") == 1
    bad = subprocess.run(
        [*launch, *words, "--train_file", "gone.csv"],
        cwd=tmp_path,
        env=HERE,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert bad.stderr.count("gone.csv: there is no such file") == 1


@pytest.mark.slow
@needs_data
def test_minilm_learns_sst2_from_the_real_file(tmp_path: Path) -> None:
    folder = SHARED / "glue" / "sst2"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pulseopt_hf", "train", "glue/sst2", "--use_cpu"),
            *("--model_name_or_path", "embedded:minilm", "--output_dir", "run"),
            *("--train_file", str(folder / "train.csv"), "--max_steps", "400"),
            *("--validation_file", str(folder / "validation.csv")),
            *("--per_device_train_batch_size", "16"),
        ],
        cwd=tmp_path,
        env=HERE,
    )
    assert done.returncode == 0
    assert results(tmp_path / "run")["eval_accuracy"] >= 0.80
