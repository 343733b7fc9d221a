"""Writes the run record: what a run is and did, into its folder while it runs."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import TrainerState

from pulseopt_hf import __version__
from pulseopt_hf.aees.run_record import (
    FILE_NAME,
    End,
    Head,
    Line,
    Log,
    NumberedEpisode,
    NumberedTrial,
    encode,
)
from pulseopt_hf.optim import AEES
from pulseopt_hf.optim.base_lr import peaks
from pulseopt_hf.trainer.upstream import run_folder

logger = logging.getLogger("pulseopt_hf")


class RunRecorder:
    """Writes `pulse.jsonl` whenever Trainer logs, on the main process. Reads no device.

    What cannot be written, because the disk is full say, is kept and written with the next lines;
    training goes on, and a warning says so once.

    Args:
        folder: the run's folder.
        aees: the AEES of the run.
        head: the first line.
        state: Trainer's state. Its log history and the episodes of `aees` are written down first:
            they are what a resumed run has from its checkpoint, so the record reads as if it had
            never stopped.
    """

    def __init__(self, folder: Path, aees: AEES, head: Head, state: TrainerState) -> None:
        self._file = folder / FILE_NAME
        self._aees = aees
        self._max_steps = head.max_steps
        self._episodes = 0  # written
        self._trials = 0  # written
        self._outcomes = 0  # written
        self._offset = 0  # size of what is whole in the file
        self._warned = False
        self._ended = False
        self._pending = [encode(head, time.time())]
        for entry in state.log_history:
            self._add_news(None, before=int(entry["step"]))
            self._add_log(entry, None)
        self._add_news(None)
        self._flush()

    @classmethod
    def of(cls, trainer: Any, aees: AEES, state: TrainerState) -> RunRecorder | None:
        """Return the recorder of a run that begins, or `None` where nothing is to be written.

        That is on other ranks, where nothing is logged, and in a neutral run.
        """
        args = trainer.args
        neutral = aees.controller.is_neutral and aees.calibrator is None
        if neutral or args.logging_strategy == "no" or not trainer.is_world_process_zero():
            return None
        folder = run_folder(trainer)
        head = Head(
            name=args.run_name or folder.resolve().name,
            max_steps=state.max_steps,
            knobs=asdict(aees.config),
            base_lr=_set_lr(aees),
            versions={
                "python": platform.python_version(),
                "pulseopt-hf": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "accelerate": accelerate.__version__,
            },
            resumed_from=state.global_step or None,
        )
        return cls(folder, aees, head, state)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Write an entry of the log history, after the episodes and trials ended before it."""
        now = time.time()
        if not self._ended:
            self._add_news(now)
        self._add_log(entry, now)
        self._flush()

    def end(self, step: int, error: BaseException | None = None) -> None:
        """Write how training ended; what is logged later, such as an evaluation, comes after."""
        if self._ended:
            return
        self._ended = True
        now = time.time()
        self._add_news(now)
        name = None if error is None else type(error).__name__
        self._add(End(step, error is None and step >= self._max_steps, name), now)
        self._flush()

    def _add_news(self, now: float | None, before: int | None = None) -> None:
        """Add the episodes and trials that were not written yet.

        Args:
            now: the time to write beside them.
            before: only those that ended before this many steps were done.
        """
        calibrator = self._aees.calibrator
        for trial in [] if calibrator is None else calibrator.search.trials[self._trials :]:
            if before is not None and trial.step >= before:
                break
            self._trials += 1
            self._add(NumberedTrial(self._trials, trial), now)
        for outcome in [] if calibrator is None else calibrator.outcomes[self._outcomes :]:
            if before is not None and outcome.step >= before:
                break
            self._outcomes += 1
            self._add(outcome, now)
        records = self._aees.controller.records
        while self._episodes < len(records):
            record = records[self._episodes]
            if before is not None and record.end_step >= before:
                break
            self._episodes += 1
            self._add(NumberedEpisode(self._episodes, record), now)

    def _add_log(self, entry: Mapping[str, Any], now: float | None) -> None:
        values = {key: value for key, value in entry.items() if key != "step"}
        self._add(Log(int(entry["step"]), values), now)

    def _add(self, line: Line, now: float | None) -> None:
        self._pending.append(encode(line, now))

    def _flush(self) -> None:
        """Append what is pending to what is whole in the file; the first time, replace the file."""
        content = b"".join(self._pending)
        try:
            if self._offset == 0:
                self._replace(content)
            else:
                self._append(content)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "The run record %s could not be written: %s. Training goes on, and the record "
                    "is written when there is room again.",
                    self._file,
                    error.strerror or error,
                )
            return
        self._offset += len(content)
        self._pending.clear()

    def _replace(self, content: bytes) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_name(FILE_NAME + ".new")
        try:
            beside.write_bytes(content)
            os.replace(beside, self._file)
        except OSError:
            beside.unlink(missing_ok=True)
            raise

    def _append(self, content: bytes) -> None:
        with self._file.open("r+b") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                raise OSError("the file has become shorter")
            # A write that failed may have left a part of a line.
            file.seek(self._offset)
            file.truncate()
            file.write(content)


def _set_lr(aees: AEES) -> float:
    """Return the LR that was set: a calibration may have changed the optimizer's since."""
    calibrator = aees.calibrator
    return max(peaks(aees.optimizer)) if calibrator is None else calibrator.search.set_lr
