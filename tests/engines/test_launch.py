"""The same script through `torchrun` and `accelerate launch`, as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engines.engine import slow
from tests.engines.ranks import free_port

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "launch_anywhere.py"
PROFILES = ROOT / "recipes" / "launch"
TIMEOUT = 150.0
STEPS = ("--use_cpu", "true", "--max_steps", "12", "--episode_length", "3")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


def start(tmp_path: Path, *command: object) -> subprocess.Popen[str]:
    here = {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}
    here |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=tmp_path,
        env={**os.environ, **here},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*launches: subprocess.Popen[str]) -> list[str]:
    """Return the outputs. Launches that hang are killed with all their ranks, and show where."""
    pool = ThreadPoolExecutor(len(launches))
    outputs = [pool.submit(launch.communicate) for launch in launches]
    hung = wait(outputs, timeout=TIMEOUT).not_done
    for process in [process for launch in launches if hung for process in family(launch)]:
        with suppress(psutil.NoSuchProcess):  # it may end meanwhile
            process.send_signal(signal.SIGABRT)  # prints where each thread is
    texts = [output.result(timeout=30)[0] for output in outputs]
    assert not hung, "A launch hangs.\n" + "\n\n".join(texts)
    return texts


def family(launch: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the launcher, if it still runs, and the ranks it has started, which come first."""
    if launch.poll() is not None:
        return []
    parent = psutil.Process(launch.pid)
    return [*parent.children(recursive=True), parent]


def summaries(output: str) -> list[dict[str, Any]]:
    """Return what each rank printed, by rank."""
    found = [json.loads(line) for line in re.findall(r'\{"rank".*\}', output)]
    return sorted(found, key=lambda summary: summary["rank"])


def check_ranks_agree(ranks: list[dict[str, Any]], world_size: int, engine: str) -> None:
    assert [summary["rank"] for summary in ranks] == list(range(world_size))
    for summary in ranks:
        assert summary["world_size"] == world_size
        assert summary["engine"] == engine
        assert len(summary["arms"]) == 4
        assert summary["arms"] == ranks[0]["arms"]
        assert summary["loss"] == ranks[0]["loss"]


# The other two tests start torchrun too.
@pytest.mark.parametrize(
    ("launcher", "ranks", "engine"),
    [
        ("ddp", 2, "DistributedDataParallel"),
        slow("torchrun", 2, "DistributedDataParallel"),
        slow("single", 1, "GPT2LMHeadModel"),
        slow("zero2", 2, "DeepSpeedEngine"),
        slow("zero3", 2, "DeepSpeedEngine"),
    ],
)
def test_a_launcher_starts_ranks_that_run_the_same_arms(
    launcher: str, ranks: int, engine: str, tmp_path: Path
) -> None:
    if launcher == "torchrun":
        words: list[object] = [*TORCHRUN, "--standalone", "--nproc_per_node", ranks]
    else:
        words = [*ACCELERATE, "--config_file", PROFILES / f"{launcher}.yaml"]
        words += ["--main_process_port", free_port()] if ranks > 1 else []
    steps = STEPS
    if launcher.startswith("zero"):
        pytest.importorskip("deepspeed", reason="install the extra `deepspeed` to run this")
        steps = (*STEPS, "--bf16", "true")
    process = start(tmp_path, *words, SCRIPT, *steps)
    (output,) = finish(process)
    assert process.returncode == 0, output
    found = summaries(output)
    check_ranks_agree(found, ranks, engine)
    assert found[0]["precision"] == ("bf16" if launcher.startswith("zero") else "no")


def test_two_nodes_of_torchrun_run_the_same_arms(tmp_path: Path) -> None:
    address = ("--master_addr", "127.0.0.1", "--master_port", free_port())
    nodes = [
        start(
            tmp_path,
            *TORCHRUN,
            *("--nnodes", 2, "--node_rank", node, "--nproc_per_node", 1, *address),
            *(SCRIPT, *STEPS, "--output_dir", tmp_path / f"node{node}"),
        )
        for node in range(2)
    ]
    outputs = finish(*nodes)
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert all(len(summaries(output)) == 1 for output in outputs), "one rank on each node"
    check_ranks_agree([summaries(output)[0] for output in outputs], 2, "DistributedDataParallel")


def test_a_rank_that_raises_under_torchrun_ends_the_launch_instead_of_hanging(
    tmp_path: Path,
) -> None:
    script = tmp_path / "one_rank_raises.py"
    script.write_text(
        "import os, runpy\n"
        "from pulseopt_hf import PulseOptTrainer\n"
        "plain = PulseOptTrainer.training_step\n"
        "def step(self, *args, **kwargs):\n"
        "    if os.environ['RANK'] == '1' and self.state.global_step == 4:\n"
        "        raise KeyError('the trouble of one rank')\n"
        "    return plain(self, *args, **kwargs)\n"
        "PulseOptTrainer.training_step = step\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    began = time.monotonic()
    process = start(tmp_path, *TORCHRUN, "--standalone", "--nproc_per_node", 2, script, *STEPS)
    (output,) = finish(process)
    assert process.returncode != 0
    assert "the trouble of one rank" in output
    assert not summaries(output), "a rank went on alone"
    assert time.monotonic() - began < TIMEOUT
