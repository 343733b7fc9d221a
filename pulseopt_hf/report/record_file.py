"""Reads a run record, all at once or as it grows. Standard library only."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pulseopt_hf.aees.calibration import Outcome, Trial
from pulseopt_hf.aees.records import EpisodeRecord
from pulseopt_hf.aees.run_record import (
    FILE_NAME,
    End,
    Head,
    Line,
    Log,
    NumberedEpisode,
    NumberedTrial,
    decode,
)
from pulseopt_hf.aees.state import StateError
from pulseopt_hf.errors import UsageError
from pulseopt_hf.report.data import RunData, Status

# A run that has written nothing for so long, measured in its longest pause so far, is silent.
_PAUSES, _PATIENCE = 10.0, 120.0


class RecordFile:
    """The record in a run's folder. Each `read` takes in only what was written since the last.

    A record that was replaced, as a resumed run does, is read anew.

    Args:
        folder: the run's folder.

    Attributes:
        head: the first line, or `None` before there is one.
        end: the line that says how training ended, or `None` before there is one.
        replaced: how often the record was replaced since it was first read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / FILE_NAME
        self.replaced = 0
        self._begin()

    def _begin(self) -> None:
        self.head: Head | None = None
        self.end: End | None = None
        self._first = b""  # the first line, by which a record is known; it has the time
        self._offset = 0  # of the first byte that was not read
        self._number = 0  # lines read
        self._logs: list[Log] = []
        self._episodes: dict[int, EpisodeRecord] = {}
        self._trials: dict[int, Trial] = {}
        self._outcome: Outcome | None = None
        self._step = 0
        self._updated: float | None = None
        self._last: float | None = None  # time of the last line that has one
        self._longest = 0.0  # pause between two lines

    def read(self) -> list[tuple[Line, float | None]]:
        """Take in the lines that were written since, each with its time, and return them.

        The last one waits until it is whole. Where there is no file there are no lines.

        Raises:
            UsageError: the file cannot be read, is damaged, or of a newer format version.
        """
        content = self._new_content()
        new: list[tuple[Line, float | None]] = []
        for raw in content.split(b"\n")[:-1]:  # what follows the last newline is not whole
            self._number += 1
            if self._number == 1:
                self._first = raw + b"\n"
            line, time = self._parse(raw)
            self._offset += len(raw) + 1
            if time is not None:
                self._longest = max(
                    self._longest, time - (time if self._last is None else self._last)
                )
                self._last = time
                self._updated = max(time, time if self._updated is None else self._updated)
            if line is not None:
                self._take(line)
                new.append((line, time))
        return new

    def data(self, now: float) -> RunData:
        """Return the run as far as its record was read.

        Args:
            now: seconds since 1970, to tell a run that goes on from one that fell silent.

        Raises:
            UsageError: the record has no line, or lines are missing.
        """
        head, end = self.head, self.end
        if head is None:
            raise UsageError(f"{self._file}: is empty; the run has not begun.")
        for name, numbers in (("episode", self._episodes), ("trial", self._trials)):
            if max(numbers, default=0) != len(numbers):
                raise UsageError(
                    f"{self._file}: is damaged; lines of the kind `{name}` are missing."
                )
        return RunData(
            folder=self._folder,
            name=head.name,
            status=self._status(now),
            step=self._step if end is None else end.step,
            max_steps=head.max_steps,
            base_lr=head.base_lr,
            knobs=head.knobs,
            versions=head.versions,
            resumed_from=head.resumed_from,
            logs=list(self._logs),
            episodes=[self._episodes[number] for number in sorted(self._episodes)],
            trials=[self._trials[number] for number in sorted(self._trials)],
            outcome=self._outcome,
            error=None if end is None else end.error,
            updated=self._updated,
        )

    def _new_content(self) -> bytes:
        try:
            with self._file.open("rb") as file:
                first = file.read(len(self._first))
                size = file.seek(0, os.SEEK_END)
                if first != self._first or size < self._offset:
                    self._begin()
                    self.replaced += 1
                file.seek(self._offset)
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise UsageError(f"{self._file}: cannot be read: {error.strerror or error}.") from error

    def _parse(self, raw: bytes) -> tuple[Line | None, float | None]:
        where = f"{self._file}, line {self._number}"
        try:
            line, time = decode(json.loads(raw))
            if self.head is None and not isinstance(line, Head):
                raise StateError("the record begins without its `head`.")
        except StateError as error:
            raise UsageError(f"{where}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: is not valid JSON: {error}.") from error
        return line, time

    def _take(self, line: Line) -> None:
        if isinstance(line, Head):
            self.head = line
        elif isinstance(line, Log):
            self._logs.append(line)
            self._step = max(self._step, line.step)
        elif isinstance(line, NumberedEpisode):
            self._episodes[line.number] = line.record
            self._step = max(self._step, line.record.end_step + 1)
        elif isinstance(line, NumberedTrial):
            self._trials[line.number] = line.trial
        elif isinstance(line, Outcome):
            self._outcome = line
        else:
            self.end = line

    def _status(self, now: float) -> Status:
        if self.end is not None:
            if self.end.error is not None:
                return "failed"
            return "finished" if self.end.finished else "stopped"
        pause = 0.0 if self._updated is None else now - self._updated
        return "silent" if pause > max(_PATIENCE, _PAUSES * self._longest) else "running"
