"""Writes the run record: what a run is and did, into its folder while it runs."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import transformers
from transformers import TrainerState, TrainingArguments

from pulseopt_hf import __version__
from pulseopt_hf.aees.left_out import kept_numbers, settled
from pulseopt_hf.aees.record_format import (
    FILE_NAME,
    End,
    Head,
    Line,
    Log,
    NumberedEpisode,
    NumberedTrial,
    RunEvent,
    Value,
    encode,
    loggable,
)
from pulseopt_hf.config import PulseOptKnobs
from pulseopt_hf.files import write_whole
from pulseopt_hf.optim import AEES
from pulseopt_hf.trainer.upstream import run_folder

logger = logging.getLogger("pulseopt_hf")

_LOG = "log of "  # and a key of the entry
_PLACES = (
    "_dir",
    "_name",
    "_token",
    "_id",
    "_checkpoint",
    "local_rank",
)  # ends of arguments' names


class _Noted(NamedTuple):
    """A line of the record: what sort it is, its number among those, when it was due, its text."""

    sort: str
    number: int
    step: int
    text: bytes


class RunRecorder:
    """Writes `pulse.jsonl` whenever Trainer logs, on the main process. Reads no device.

    What cannot be written, because the disk is full say, is kept and written with the next lines;
    training goes on, and a warning says so once.

    It has a bounded number of lines of each sort, in memory and in the file: see `kept_numbers`.
    Entries of the log are of the same sort if the first of their keys, by the alphabet, is. When
    lines are to be left out, the file is replaced.

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
        self._head = head
        self._began = time.time()
        self._counts = Counter[str]()  # lines of each sort so far, with those that are left out
        self._settled: dict[str, int] = {}
        self._lines: list[_Noted] = []
        self._written = 0  # of the lines
        self._offset = 0  # size of what is whole in the file
        self._warned = False
        self._ended = False
        self._add("head", -1, head, self._began)
        for event in aees.events():
            self._add_event(event, None)
        aees.listeners.append(lambda event: self._add_event(event, time.time()))
        counts = Counter(map(_sort, state.log_history))
        kept = {sort: set(kept_numbers(count)) for sort, count in counts.items()}
        for entry in state.log_history:
            if self._counts[_sort(entry)] + 1 in kept[_sort(entry)]:
                self._add_log(entry, None)
            else:
                self._counts[_sort(entry)] += 1
        self._lines.sort(key=lambda line: line.step)
        self._flush()

    @classmethod
    def of(cls, trainer: Any, aees: AEES, state: TrainerState) -> RunRecorder | None:
        """Return the recorder of a run that begins, or `None` where nothing is to be written.

        That is on other ranks, where nothing is logged, and in a neutral run.
        """
        args = trainer.args
        if aees.is_plain or args.logging_strategy == "no" or not trainer.is_world_process_zero():
            return None
        folder = run_folder(trainer)
        head = Head(
            name=args.run_name or folder.resolve().name,
            max_steps=state.max_steps,
            knobs=asdict(aees.config),
            base_lr=aees.set_lr,
            versions={
                "python": platform.python_version(),
                "pulseopt-hf": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "accelerate": accelerate.__version__,
            },
            resumed_from=state.global_step or None,
            arguments=_arguments(args),
        )
        return cls(folder, aees, head, state)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Write an entry of the log history, after the episodes and trials ended before it."""
        self._add_log(entry, time.time())
        self._flush()

    def end(self, step: int, error: BaseException | None = None) -> None:
        """Write how training ended; what is logged later, such as an evaluation, comes after."""
        if self._ended:
            return
        self._ended = True
        finished = error is None and step >= self._head.max_steps
        name = None if error is None else type(error).__name__
        self._add("end", step, End(step, finished, name), time.time())
        self._flush()

    def _add_event(self, event: RunEvent, now: float | None) -> None:
        if isinstance(event, NumberedEpisode):
            self._counts["episode"] = event.number - 1  # of very many, some are left out already
            self._add("episode", event.record.end_step + 1, event, now)
        elif isinstance(event, NumberedTrial):
            self._add("trial", event.trial.step + 1, event, now)
        else:
            self._add("calibration", event.step + 1, event, now)

    def _add_log(self, entry: Mapping[str, Any], now: float | None) -> None:
        values = {key: value for key, value in entry.items() if key != "step"}
        step = int(entry["step"])
        self._add(_sort(entry), step, Log(step, values), now)

    def _add(self, sort: str, step: int, line: Line, now: float | None) -> None:
        self._counts[sort] += 1
        self._lines.append(_Noted(sort, self._counts[sort], step, encode(line, now)))

    def _leave_out(self) -> None:
        """Drop the lines that are not to be kept, where there are any."""
        now_settled = {sort: settled(count) for sort, count in self._counts.items()}
        if now_settled == self._settled:
            return
        self._settled = now_settled
        kept = {sort: set(kept_numbers(count)) for sort, count in self._counts.items()}
        logs = sum(self._counts[sort] - len(kept[sort]) for sort in kept if sort.startswith(_LOG))
        head = replace(self._head, left_out=self._aees.controller.left_out, left_out_logs=logs)
        if head != self._head:
            first = self._lines[0]._replace(text=encode(head, self._began))
            others = [line for line in self._lines[1:] if line.number in kept[line.sort]]
            self._head, self._lines = head, [first, *others]
            self._written = self._offset = 0

    def _flush(self) -> None:
        """Append new lines to what is whole in the file, or replace it by all lines."""
        self._leave_out()
        content = b"".join(line.text for line in self._lines[self._written :])
        try:
            if self._offset == 0:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._file, content)
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
        self._written = len(self._lines)

    def _append(self, content: bytes) -> None:
        with self._file.open("r+b") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                raise OSError("the file has become shorter")
            # A write that failed may have left a part of a line.
            file.seek(self._offset)
            file.truncate()
            file.write(content)


def _arguments(args: TrainingArguments) -> dict[str, Value]:
    """Return the arguments that are set, but for the knobs and for where a run is."""
    knobs = {one.name for one in fields(PulseOptKnobs)}
    return {
        key: value
        for key, value in loggable(args.to_sanitized_dict()).items()
        if value != "None" and key not in knobs and not key.endswith(_PLACES)
    }


def _sort(entry: Mapping[str, Any]) -> str:
    # Trainer writes them sorted by key into a checkpoint, so their order says nothing.
    return _LOG + min(entry.keys() - {"epoch", "step"}, default="nothing")
