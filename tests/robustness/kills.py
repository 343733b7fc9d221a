"""Runs that are killed at any moment and started again, and what they must end equal to.

A run is forked from a process that has imported everything, so that a start takes a moment and not
ten seconds. It tells where it is through memory that it shares with the process that kills it.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pulseopt_hf import PulseOptConfig, PulseOptTrainer, cli, newest_whole_checkpoint
from pulseopt_hf.optim.calibrator import Calibrator
from pulseopt_hf.report.record_reader import read_run
from pulseopt_hf.trainer.mixin import PulseOptMixin
from tests.conftest import ARMS, logged, make_arguments
from tests.engines.ranks import start_ranks

FORK = multiprocessing.get_context("fork")
CONFIG = {**ARMS, "episode_length": 7, "calibration": "trust_region", "divergence": "rollback"}
PLACES = ("start", "search", "trial", "watch", "episodes", "save", "end")
AIMS = (*PLACES, *("save",) * 4)
LONGEST = 600.0  # seconds that a start may take; only a hang does, on the slowest machine too


class Mark:
    """Where a process is, in memory that outlives it: one of `PLACES`, and the step."""

    def __init__(self) -> None:
        self._cells = FORK.RawArray("q", 2)

    @property
    def place(self) -> str:
        return PLACES[self._cells[0]]

    @place.setter
    def place(self, place: str) -> None:
        self._cells[0] = PLACES.index(place)

    @property
    def step(self) -> int:
        return self._cells[1]

    def restart(self) -> None:
        self.place, self._cells[1] = "start", 0

    def follow(self) -> None:
        """Set the place from now on as the Trainer of this process comes by."""
        self._set_during(PulseOptMixin, "_save_checkpoint", "save")
        self._set_during(Calibrator, "run", "trial")
        plain_step, plain_train = PulseOptMixin.training_step, PulseOptMixin.train

        def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            calibrator = trainer.aees.calibrator
            if calibrator is None or calibrator.is_done:
                self.place = "episodes"
            else:
                self.place = "search" if calibrator.is_searching else "watch"
            self._cells[1] = trainer.state.global_step
            return plain_step(trainer, *args, **kwargs)

        def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            result = plain_train(trainer, *args, **kwargs)
            self.place = "end"
            return result

        PulseOptMixin.training_step, PulseOptMixin.train = training_step, train  # type: ignore

    def _set_during(self, owner: type, name: str, place: str) -> None:
        plain = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            before, self.place = self.place, place
            try:
                return plain(*args, **kwargs)
            finally:
                self.place = before

        setattr(owner, name, marked)


@dataclass(frozen=True)
class Kill:
    """A kill that hit.

    Attributes:
        place: one of `PLACES`, which the process was at when it died; of a process that does not
            tell, "save" if it left half a checkpoint, and else "unknown".
        left_half: whether the newest checkpoint was not whole afterwards.
    """

    place: str
    left_half: bool


class Run:
    """What can be started in a folder, killed, and started again.

    Args:
        body: runs in each process, with the folder and the rank, to the end or until it is killed.
        steps: of the whole run.
        ends: files that must be equal, byte for byte, however often the run was killed.
        ranks: number of processes.
        tells: whether the processes can say where they are.
    """

    def __init__(
        self,
        body: Callable[[Path, int], None],
        steps: int,
        ends: Sequence[str],
        *,
        ranks: int = 1,
        tells: bool = True,
    ) -> None:
        self._body, self._steps, self._ends, self._tells = body, steps, ends, tells
        self._marks = [Mark() for _ in range(ranks)]

    def survive(self, folder: Path, kills: int, rng: random.Random) -> list[Kill]:
        """Start, kill and start again until the run is done; return the kills that hit.

        There may be fewer than were asked for, since the run may be done before the last.
        """
        folder.mkdir(parents=True, exist_ok=True)
        taken: list[Kill] = []
        deadline = time.monotonic() + 2 * LONGEST + 20 * kills
        while True:
            assert time.monotonic() < deadline, f"the run in {folder} does not get on"
            processes = self._start(folder)
            to_be_killed = len(taken) < kills
            if to_be_killed:
                # The kills spread over the run, and are closer where it calibrates.
                after = int(self._steps * (len(taken) / kills) ** 2)
                is_last = len(taken) == kills - 1
                self._wait_for_a_moment(rng, folder, processes, after, is_last)
                self._kill(rng, processes)
            for process in processes:
                process.join(timeout=LONGEST)
            codes = {process.exitcode for process in processes}
            if codes == {0}:
                return taken
            # Where one rank was killed, the other may have failed before its turn came.
            output = (folder / "output.txt").read_text(errors="replace")
            hit = to_be_killed and -signal.SIGKILL in codes
            assert hit, f"the run in {folder} ended with {codes}:\n{output[-5000:]}"
            taken.append(self._describe(folder))

    def assert_equal(self, one: Path, other: Path) -> None:
        """Assert that two runs ended equal bit for bit, and that their records read the same."""
        for name in self._ends:
            assert (one / name).read_bytes() == (other / name).read_bytes(), f"{other / name}"
        record, expected = read_run(other), read_run(one)
        assert record.loss == expected.loss != []
        assert record.episodes == expected.episodes != []
        assert record.trials == expected.trials != []
        assert record.outcome == expected.outcome is not None
        assert record.status == expected.status == "finished"

    def _start(self, folder: Path) -> list[BaseProcess]:
        for mark in self._marks:
            mark.restart()

        def body(rank: int) -> None:
            output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            self._marks[rank].follow()
            try:
                self._body(folder, rank)
            except Exception:
                traceback.print_exc()
                raise

        if len(self._marks) > 1:
            # Kept, since a rank that can report to nobody fails.
            self._started = start_ranks(len(self._marks), body)
            return [process for process, _ in self._started]
        process = FORK.Process(target=body, args=(0,), daemon=True)
        process.start()
        return [process]

    def _wait_for_a_moment(
        self,
        rng: random.Random,
        folder: Path,
        processes: Sequence[BaseProcess],
        after: int,
        is_last: bool,
    ) -> None:
        """Wait for a step, then for one of the places if the run soon comes by it, and a bit."""
        mark, aim = self._marks[0], rng.choice(AIMS)
        if is_last and rng.random() < 0.5:
            aim = "end"

        def is_alive() -> bool:
            return all(process.is_alive() for process in processes)

        if not self._tells:  # until there is a new checkpoint, of that step or of a later one
            wanted = max(newest_step(folder) + 1, after)
            while is_alive() and newest_step(folder) < wanted:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.5))
            return
        if aim == "start":
            time.sleep(rng.uniform(0.0, 0.5))
            return
        while is_alive() and (mark.place == "start" or mark.step < after):
            time.sleep(0.001)
        if aim != "end":
            time.sleep(rng.uniform(0.0, 0.2))
        # A save comes soon, however slow the machine is; the others may be over already.
        comes = aim == "save" or (aim == "end" and is_last)
        limit = time.monotonic() + (LONGEST if comes else rng.uniform(0.0, 0.5))
        while is_alive() and mark.place != aim and time.monotonic() < limit:
            time.sleep(0.001)
        if aim != "end":  # which is short
            time.sleep(rng.uniform(0.0, 0.02))

    def _kill(self, rng: random.Random, processes: Sequence[BaseProcess]) -> None:
        for index, process in enumerate(rng.sample(list(processes), len(processes))):
            if index > 0 and rng.random() < 0.5:
                time.sleep(rng.uniform(0.0, 0.05))  # the others notice, or do not
            process.kill()

    def _describe(self, folder: Path) -> Kill:
        left_half = bool(newest_whole_checkpoint(folder)[1])
        places = [mark.place for mark in self._marks]
        if not self._tells:
            return Kill("save" if left_half else "unknown", left_half)
        return Kill("save" if "save" in places else places[0], left_half)


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint in a folder, whole or not; 0 without any."""
    steps = (int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))
    return max(steps, default=0)


def script(model: Callable[[], Any], data: Any, steps: int, ranks: int = 1) -> Run:
    """A script of one's own, with a checkpoint every third step, on one rank or more of DDP."""

    def train(folder: Path, rank: int) -> None:
        args = make_arguments(
            folder,
            per_device_train_batch_size=4 // ranks,
            gradient_accumulation_steps=2,
            max_steps=steps,
            save_steps=3,
            save_total_limit=3,
        )
        assert args.world_size == ranks
        trainer = PulseOptTrainer(model(), args, train_dataset=data, pulse=PulseOptConfig(**CONFIG))
        checkpoint, _ = newest_whole_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        moments = [state.values() for state in trainer.optimizer.state.values()]
        end = {
            "losses": logged(trainer),
            "logs": trainer.aees.get_logs(),
            "parameters": fingerprint(trainer.model.parameters()),
            "optimizer": fingerprint(itertools.chain.from_iterable(moments)),
        }
        (folder / f"end-{rank}.json").write_text(json.dumps(end))

    return Run(train, steps, [f"end-{rank}.json" for rank in range(ranks)], ranks=ranks)


def fingerprint(tensors: Any) -> list[str]:
    """Return a hash of each tensor's bytes."""
    return [hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for tensor in tensors]


def command(words: Sequence[str], steps: int, *, own_process: bool = False) -> Run:
    """`pulseopt-hf train WORDS`, forked like a script, or as a new process of the interpreter.

    It calibrates, accumulates, plays arms, and saves every third step.

    Args:
        words: name the recipe, its files and its model.
        steps: of the run.
        own_process: which of the two.
    """
    words = [
        *(*words, "--max_steps", str(steps), "--save_strategy", "steps", "--save_steps", "3"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"),
        *("--lr_candidates", "0.5", "1", "2", "--episode_length", "7", "--logging_steps", "1"),
        *("--use_cpu", "--quiet"),
    ]

    def train(folder: Path, rank: int) -> None:
        checkpoint, _ = newest_whole_checkpoint(folder)
        start = "--overwrite" if checkpoint is None else "--resume"
        full = ["train", *words, "--output_dir", str(folder), start]
        if own_process:
            os.execv(sys.executable, [sys.executable, "-m", "pulseopt_hf", *full])
        sys.exit(cli.main(full))

    return Run(train, steps, ["model.safetensors"], tells=not own_process)
