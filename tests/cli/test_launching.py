"""`pulseopt-hf train --accelerate_config`: one command that starts itself on several processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pulseopt_hf.cli import main
from tests.engines.ranks import free_port
from tests.recipes.tiny import files_of

ROOT = Path(__file__).parents[2]
HERE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
HERE["PYTHONPATH"] = str(ROOT)
ALONE = [sys.executable, "-m", "pulseopt_hf"]
LAUNCH = ["--num_processes", "2", "--main_process_port", "0"]  # of ranks that find a free port
TIMEOUT = 200

# FSDP of Accelerate wants a GPU; this makes it take the CPU for one, in every process.
FSDP_ON_CPU = """
import os
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from accelerate import state
    plain = state.AcceleratorState.__init__
    def init(self, *args, **kwargs):
        plugin = kwargs.get("fsdp_plugin")
        plain(self, *args, **kwargs)
        if plugin is not None and self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type = state.DistributedType.FSDP
            plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            state.PartialState._shared_state["distributed_type"] = self.distributed_type
    state.AcceleratorState.__init__ = init
"""


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ALONE, *words], capture_output=True, text=True, env=HERE, timeout=TIMEOUT
    )


@pytest.fixture
def words(bert: str, work: Path) -> list[str]:
    given = ["train", "glue/sst2", "--model_name_or_path", bert, "--use_cpu"]
    given += ["--per_device_train_batch_size", "4", "--output_dir", "run"]
    return [*given, *files_of("sst2", work.parent / "data")]


def record(work: Path) -> dict[str, object]:
    last: dict[str, object] = json.loads((work / "run" / "run.json").read_text())["commands"][-1]
    return last


@pytest.mark.distributed
@pytest.mark.parametrize("profile", [[], ["--accelerate_config", "launch/ddp"]])
def test_one_command_trains_on_two_ranks(profile: list[str], words: list[str], work: Path) -> None:
    given = [*words, "--max_steps", "10", *profile, *LAUNCH]
    done = command(*given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("episode   1 ") == 1
    assert record(work)["processes"] == 2
    assert record(work)["command"] == ["pulseopt-hf", *given]


@pytest.mark.distributed
@pytest.mark.parametrize("profile", ["ddp", "single"])
def test_a_mistake_is_told_once_and_its_exit_code_comes_through(
    profile: str, words: list[str], work: Path
) -> None:
    launch = LAUNCH if profile == "ddp" else []
    given = [*words, "--max_steps", "10", "--accelerate_config", profile, *launch]
    done = command(*given, "--train_file", "gone.csv")
    assert done.returncode == 2
    assert done.stderr.count("gone.csv: there is no such file") == 1
    assert "Traceback" not in done.stderr
    assert list(work.iterdir()) == []


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_ranks_with_a_checkpoint_and_the_command_that_goes_on(
    number: signal.Signals, words: list[str], work: Path
) -> None:
    words += ["--accelerate_config", "ddp", *LAUNCH, "--save_strategy", "no"]
    process = subprocess.Popen(
        [*ALONE, *words, "--max_steps", "100000"],
        env=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = work / "run" / "train.log"
    deadline = time.monotonic() + TIMEOUT
    ranks: list[psutil.Process] = []
    try:
        while not (log.exists() and "\nstep 60 " in log.read_text()):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks = psutil.Process(process.pid).children(recursive=True)
        for rank in ranks if number == signal.SIGTERM else []:
            rank.send_signal(number)  # a scheduler's, which torchrun sends once more
        os.killpg(process.pid, number)
        _, error = process.communicate(timeout=TIMEOUT)
    finally:
        for left in [*ranks, process]:
            with suppress(psutil.NoSuchProcess):
                left.kill()
    assert process.returncode == 1
    assert "Traceback" not in error
    stopped = re.search(r"Stopped at step (\d+) of 100000; checkpoint-(\d+) is saved\.", error)
    assert stopped is not None, error
    go_on = next(line for line in error.splitlines() if line.startswith("pulseopt-hf train"))
    assert shlex.split(go_on)[1:] == [*words, "--max_steps", "100000", "--resume"]
    done = command(*shlex.split(go_on)[1:], "--max_steps", str(int(stopped[1]) + 5))
    assert done.returncode == 0, done.stderr
    assert f"going on from {Path('run') / ('checkpoint-' + stopped[1])}" in done.stdout
    assert record(work)["processes"] == 2


@pytest.mark.distributed
def test_the_fsdp2_profile_shards_the_model(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work.parent / "sitecustomize.py").write_text(FSDP_ON_CPU)
    monkeypatch.setitem(HERE, "PYTHONPATH", f"{ROOT}{os.pathsep}{work.parent}")
    # An update's norm cannot be logged of a sharded model.
    given = ["train", "quickstart/lm", "--use_cpu", "--output_dir", "run", "--max_steps", "10"]
    given += ["--accelerate_config", "fsdp2", *LAUNCH]
    refused = command(*given, "--log_update_norm", "true")
    assert refused.returncode == 1
    assert "these are sharded over ranks" in refused.stderr
    done = command(*given, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert record(work)["processes"] == 2
    assert (work / "run" / "model.safetensors").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_the_zero3_profile_divides_the_model_as_it_is_made(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks make it at once; one after the other, they would wait for each other for good."""
    pytest.importorskip("deepspeed", reason="install the extra `deepspeed` to run this")
    monkeypatch.setitem(HERE, "DS_ACCELERATOR", "cpu")
    given = ["train", "quickstart/lm", "--use_cpu", "--output_dir", "run", "--max_steps", "10"]
    given += ["--accelerate_config", "zero3", "--bf16", "true", "--num_processes", "2"]
    done = command(*given, "--main_process_port", str(free_port()))
    assert done.returncode == 0, done.stderr
    assert record(work)["processes"] == 2


@pytest.mark.distributed
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
    subprocess.run(["bash", "-n", "slurm.sh"], check=True)
    done = subprocess.run(
        ["bash", "slurm.sh", *words[1:], "--max_steps", "10"],
        env={**HERE, **slurm, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("episode   1 ") == 1
    assert record(work)["processes"] == 2
    ran: Any = record(work)["command"]
    assert ran[ran.index("--machine_rank") + 1] == "0", "the record is of the first node"
    assert ran[ran.index("--num_machines") + 1] == "2"


def test_a_profile_that_is_not_there_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused("train", "glue/sst2", "--accelerate_config", "fsdp3")
    assert "there is no `fsdp3`; profiles are ddp, fsdp2, single, two_node, zero2, zero3" in said
    monkeypatch.setenv("RANK", "0")
    said = refused("train", "glue/sst2", "--num_processes", "2")
    assert "leave out `accelerate launch` or `torchrun`" in said
