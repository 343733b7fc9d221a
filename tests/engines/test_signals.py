"""Ctrl-C and SIGTERM to a launched command of two ranks: a checkpoint, an end, and a way on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recipes.tiny import bert, files_of

__all__ = ["bert"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_ranks_stop_with_a_checkpoint_and_go_on(tmp_path: Path, bert: str, number: int) -> None:
    run = tmp_path / "run"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    train = ["-m", "pulseopt_hf", "train", "glue/cola", *files_of("cola", tmp_path / "data")]
    train += ["--model_name_or_path", bert, "--use_cpu", "--per_device_train_batch_size", "4"]
    train += ["--save_strategy", "steps", "--save_steps", "10", "--output_dir", str(run)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launch, *train, "--max_steps", "100000"], env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal sends Ctrl-C, and a scheduler SIGTERM
    assert process.wait(timeout=60) != 0
    steps = sorted(int(folder.name.split("-")[1]) for folder in run.glob("checkpoint-*"))
    last = steps[-1]
    done = subprocess.run(
        [*launch, *train, "--max_steps", str(last + 5), "--resume"],
        env=environment,
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resuming from {run}/checkpoint-{last}" in done.stdout
