"""Ranks forked from the process that runs the tests: real gloo groups without a second import.

A rank reports over a pipe what its body returned or raised. Nothing waits longer than the limit:
whoever is left then is killed, and the test fails.
"""

import importlib.util
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

os.environ.setdefault("DS_ACCELERATOR", "cpu")
if importlib.util.find_spec("deepspeed"):
    # Accelerate imports it where it is installed; better once here than in every rank.
    import deepspeed.ops

    # Spares its CPU collectives, which gloo stands in for and which take a minute to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

TIMEOUT = 60.0  # seconds that ranks may take, imports excluded


@dataclass(frozen=True)
class Failure:
    """What a rank raised, and how many seconds after the start."""

    error: str
    seconds: float


def run_ranks(world_size: int, body: Callable[[int], Any], timeout: float = TIMEOUT) -> list[Any]:
    """Return what `body(rank)` returned on every rank; a rank that raises fails the test."""
    results = ranks_with_failures(world_size, body, timeout)
    failures = [result for result in results if isinstance(result, Failure)]
    assert not failures, failures[0].error
    return results


def ranks_with_failures(
    world_size: int, body: Callable[[int], Any], timeout: float = TIMEOUT
) -> list[Any]:
    """Return for every rank what `body(rank)` returned, or a `Failure`."""
    deadline = time.monotonic() + timeout
    started = start_ranks(world_size, body)
    results: list[Any] = [None] * world_size
    waiting = {reader: rank for rank, (_, reader) in enumerate(started)}
    try:
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {sorted(waiting.values())} hung for {timeout:g} s"
            for reader in ready:
                rank = waiting.pop(reader)  # type: ignore[index]
                try:
                    # Whole, not by torch's shared memory, which the rank would have to outlive.
                    results[rank] = pickle.loads(reader.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    results[rank] = Failure(f"rank {rank} died without a word", 0.0)
    finally:
        for process, _ in started:
            process.join(timeout=5.0 if not waiting else 0.0)
            if process.is_alive():
                process.kill()
                process.join()
    return results


def start_ranks(
    world_size: int, body: Callable[[int], Any]
) -> list[tuple[BaseProcess, Connection]]:
    """Start `body(rank)` on every rank, and return the processes and what they report to."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    started: list[tuple[BaseProcess, Connection]] = []
    for rank in range(world_size):
        reader, writer = context.Pipe(duplex=False)
        arguments = (rank, world_size, port, body, writer)
        process = context.Process(target=_rank, args=arguments)
        process.start()
        writer.close()
        started.append((process, reader))
    return started


def note_collectives(patch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return where each collective and the bytes it is handed are noted, in ranks forked too."""
    sent: list[tuple[str, int]] = []

    def noting(name: str, plain: Any) -> Any:
        def collective(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sent.append((name, tensor.numel() * tensor.element_size()))
            return plain(tensor, *args, **kwargs)

        return collective

    for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"):
        patch.setattr(dist, name, noting(name, getattr(dist, name)))
    return sent


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _rank(rank: int, world_size: int, port: int, body: Callable[[int], Any], to: Any) -> None:
    start = time.monotonic()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    # Tests before this one may have left Accelerate's singletons, which describe one process.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    code = 0
    try:
        to.send_bytes(pickle.dumps(body(rank)))
    except BaseException:
        failure = Failure(traceback.format_exc(), time.monotonic() - start)
        to.send_bytes(pickle.dumps(failure))
        code = 1
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's exit, where gloo's threads can abort the process.
    os._exit(code)
