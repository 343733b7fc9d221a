"""`pulseopt-hf train --accelerate_config`: one command that starts itself on several processes."""

import json
import os
import shlex
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from pulseopt_hf.cli import main
from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes.launching import leave_ranks
from tests.cli.processes import ACCELERATE, ALONE, HERE, RANKS, TIMEOUT, command, interrupted
from tests.conftest import run_command
from tests.engines.engine import slow
from tests.engines.ranks import free_port

FSDP_ON_CPU = """
import os
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from tests.engines.engine import allow_fsdp_on_cpu
    allow_fsdp_on_cpu()
"""


@pytest.fixture
def words(local: Callable[..., list[str]], work: Path) -> list[str]:
    return ["train", *local(), "--max_steps", "10"]


def last_command(run: Path) -> Any:
    return json.loads((run / "run.json").read_text())["commands"][-1]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("by", "more"),
    [
        (ALONE, RANKS),
        slow(ALONE, ["--accelerate_config", "launch/ddp", *RANKS]),
        slow(ACCELERATE, []),
    ],
)
def test_a_command_trains_on_two_ranks_in_one_folder(by, more, words, work):
    done = command(*words, *more, by=by)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("episode   1 ") == 1
    (run,) = (work / "runs").iterdir()
    assert run.name == "glue-sst2"
    assert last_command(run)["processes"] == 2
    assert last_command(run)["command"] == ["pulseopt-hf", *words, *more]


@pytest.mark.parametrize(
    ("problem", "left"), [(None, True), (UsageError("a"), True), (RuntimeError("a"), False)]
)
def test_a_rank_leaves_its_process_group_before_python_exits(problem, left):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with suppress(type(problem) if problem else ()), ExitStack() as stack:
            stack.push(leave_ranks)
            if problem:
                raise problem
        assert distributed.is_initialized() is not left
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("by", "more", "code"),
    [
        slow(ALONE, ["--accelerate_config", "ddp", *RANKS], 2),
        (ALONE, ["--accelerate_config", "single"], 2),
        slow(ACCELERATE, [], 1),  # which says itself where it failed
    ],
)
def test_a_mistake_is_told_once_and_its_exit_code_comes_through(by, more, code, words, work):
    done = command(*words, *more, "--train_file", "gone.csv", by=by)
    assert done.returncode == code
    assert done.stderr.count("gone.csv: there is no such file") == 1
    assert ("Traceback" in done.stderr) == (by == ACCELERATE)
    assert list(work.iterdir()) == []


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_ends_the_ranks_with_a_checkpoint_and_the_command_that_goes_on(
    number: signal.Signals, words: list[str], work: Path
) -> None:
    words += ["--accelerate_config", "ddp", *RANKS, "--save_strategy", "no"]
    words += ["--output_dir", "run", "--max_steps", "100000"]
    step, go_on = interrupted(words, work / "run", "\nstep 60 ", number)
    assert go_on == [*words, "--resume"]
    done = command(*go_on, "--max_steps", str(int(step) + 5))
    assert done.returncode == 0, done.stderr
    assert f"resuming from {Path('run') / f'checkpoint-{step}'}" in done.stdout
    assert last_command(work / "run")["processes"] == 2


@pytest.mark.distributed
@pytest.mark.slow
def test_the_fsdp2_profile_shards_the_model(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work.parent / "sitecustomize.py").write_text(FSDP_ON_CPU)
    path = [work.parent, Path(__file__).parents[2], HERE.get("PYTHONPATH", "")]
    monkeypatch.setitem(HERE, "PYTHONPATH", os.pathsep.join(map(str, path)))
    # An update's norm cannot be logged of a sharded model.
    given = ["train", "quickstart/lm", "--use_cpu", "--output_dir", "run", "--max_steps", "10"]
    given += ["--accelerate_config", "fsdp2", *RANKS]
    refused = command(*given, "--log_update_norm", "true")
    assert refused.returncode == 1
    assert "these are sharded over ranks" in refused.stderr
    done = command(*given, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert last_command(work / "run")["processes"] == 2
    assert (work / "run" / "model.safetensors").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_the_zero3_profile_divides_the_model_as_it_is_made(work, monkeypatch):
    """All ranks make it at once; one after the other, they would wait for each other for good."""
    pytest.importorskip("deepspeed", reason="install the extra `deepspeed` to run this")
    monkeypatch.setitem(HERE, "DS_ACCELERATOR", "cpu")
    given = ["train", "quickstart/lm", "--use_cpu", "--output_dir", "run", "--max_steps", "10"]
    given += ["--accelerate_config", "zero3", "--bf16", "true", "--num_processes", "2"]
    done = command(*given, "--main_process_port", str(free_port()))
    assert done.returncode == 0, done.stderr
    assert last_command(work / "run")["processes"] == 2


@pytest.mark.distributed
@pytest.mark.slow
def test_the_script_for_slurm_trains_on_two_nodes(words: list[str], work: Path) -> None:
    """Slurm's own commands do here what they do there, on one machine: one launch for each node."""
    commands = {
        "srun": 'for id in 0 1; do SLURM_NODEID=$id "$@" & done; wait -n && wait -n',
        "scontrol": '[ "$*" = "show hostnames node[1-2]" ] && echo 127.0.0.1 && echo node2',
        "pulseopt-hf": f'exec {shlex.join(ALONE)} "$@"',
    }
    path = work.parent / "bin"
    path.mkdir()
    for name, body in commands.items():
        (path / name).write_text(f"#!/bin/bash\n{body}\n")
        (path / name).chmod(0o755)
    assert main(["cp", "launch/slurm.sh", "slurm.sh"]) == 0
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    slurm |= {"SLURM_JOB_ID": "7", "MAIN_PORT": str(free_port())}
    run_command("bash", "-n", "slurm.sh")
    here = {**HERE, **slurm, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    given = [*words[1:], "--output_dir", "run"]
    done = run_command("bash", "slurm.sh", *given, env=here, timeout=TIMEOUT)
    assert done.stdout.count("episode   1 ") == 1
    assert last_command(work / "run")["processes"] == 2
    ran = last_command(work / "run")["command"]
    assert ran[ran.index("--machine_rank") + 1] == "0", "the record is of the first node"
    assert ran[ran.index("--num_machines") + 1] == "2"


def test_a_profile_that_is_not_there_is_refused(refused, monkeypatch):
    said = refused("train", "glue/sst2", "--accelerate_config", "fsdp3")
    assert "Unknown launch profile `launch/fsdp3`; did you mean `launch/fsdp2`?" in said
    said = refused("train", "glue/sst2", "--accelerate_config", "mine.yaml")
    assert "mine.yaml: there is no such file" in said
    monkeypatch.setenv("RANK", "0")
    said = refused("train", "glue/sst2", "--num_processes", "2")
    assert "leave out `accelerate launch` or `torchrun`" in said
