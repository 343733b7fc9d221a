"""The command as processes: alone, on two ranks, and interrupted."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

HERE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
ALONE = [sys.executable, "-m", "pulseopt_hf"]
RANKS = ["--num_processes", "2", "--main_process_port", "0"]  # which find a free port
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *RANKS]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["-m", "pulseopt_hf"]
TIMEOUT = 280


def command(*words: str, by: list[str] = ALONE) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*by, *words], capture_output=True, text=True, env=HERE, timeout=TIMEOUT)


def interrupted(
    words: list[str], run: Path, at: str, number: signal.Signals = signal.SIGINT
) -> tuple[str, list[str]]:
    """Interrupt a command once its log has a text; return its step, and the words to go on with.

    SIGTERM reaches every process, as from a scheduler; torchrun then sends it to its own once more.
    """
    process = subprocess.Popen(
        [*ALONE, *words],
        env=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log, deadline = run / "train.log", time.monotonic() + TIMEOUT
    ranks: list[psutil.Process] = []
    try:
        while not (log.exists() and at in log.read_text()):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks = psutil.Process(process.pid).children(recursive=True)
        for rank in ranks if number == signal.SIGTERM else []:
            rank.send_signal(number)
        os.killpg(process.pid, number)
        _, error = process.communicate(timeout=TIMEOUT)
    finally:
        for left in [*ranks, process]:
            with suppress(psutil.NoSuchProcess):
                left.kill()
    assert process.returncode == 1
    assert "Traceback" not in error
    stopped = re.search(r"Stopped at step (\d+) of \d+; checkpoint-(\d+) is saved\.", error)
    assert stopped is not None, error
    assert stopped[1] == stopped[2]
    # What it says is the whole command, to be pasted.
    (said,) = (line for line in error.splitlines() if line.startswith("pulseopt-hf "))
    return stopped[1], shlex.split(said)[1:]
