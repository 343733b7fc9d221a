"""Reads a run record, all at once or as it grows. Standard library only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pulseopt_hf.aees.calibration import Outcome
from pulseopt_hf.aees.json_checks import StateError
from pulseopt_hf.aees.record_format import (
    FILE_NAME,
    End,
    Head,
    Line,
    Log,
    NumberedEpisode,
    NumberedTrial,
    decode,
)
from pulseopt_hf.errors import UsageError
from pulseopt_hf.report.run_data import RunData, Status

# A run that has written nothing for so long, measured in its longest pause so far, is silent.
_PAUSES, _PATIENCE = 10.0, 120.0

News = Sequence[tuple[Line, float | None]]


def read_run(folder: str | Path, *, now: float | None = None) -> RunData:
    """Read what a run has recorded so far in its `output_dir`.

    `now`, in seconds since 1970, tells a run that goes on from one that fell silent.

    Raises:
        UsageError: the folder has no run record, or one that is damaged or of a newer version.
    """
    path = Path(folder)
    require_folder(path)
    if not (path / FILE_NAME).is_file():
        raise UsageError(
            f"{path}: has no run record ({FILE_NAME}). `PulseOptTrainer` and an attached "
            "`PulseOptCallback` write one when they calibrate or play several arms and "
            "`logging_strategy` is not 'no'. Name the `output_dir` of such a run."
        )
    reader = RecordReader(path)
    reader.read()
    return reader.data(time.time() if now is None else now)


def require_folder(path: Path) -> None:
    """Raise `UsageError` unless there is a folder."""
    if not path.exists():
        raise UsageError(f"{path}: there is no such folder.")
    if not path.is_dir():
        raise UsageError(f"{path}: is a file; name the run's folder, its `output_dir`.")


class RecordReader:
    """The record in a run's folder. Each `read` takes in only what was written since the last.

    A resumed run replaces its record, which is then read from the beginning. A long run replaces it
    to leave out older lines; the lines that were read before are then not returned again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / FILE_NAME
        self.replaced = 0  # how often a resumed run replaced the record since it was first read
        self._began: float | None = None  # the head's time, which a record that is thinned keeps
        self._count = 0  # lines so far, those that were left out among them
        self._begin()

    def _begin(self) -> None:
        self._first = b""  # the first line, by which a record is known; it has the time
        self._offset = 0  # of the first byte that was not read
        # A line of a kind that this release does not know is `None`.
        self._lines: list[tuple[Line | None, float | None]] = []

    @property
    def has_begun(self) -> bool:
        """Whether there is a first line."""
        return bool(self._lines)

    def read(self) -> News:
        """Take in the lines that were written since, each with its time, and return them.

        An incomplete last line is left for the next time. Without a file there are no lines.
        """
        content = self._new_content()
        start = len(self._lines)
        for raw in content.split(b"\n")[:-1]:  # what follows the last is not whole
            line, time = self._parse(raw)
            self._first = self._first or raw + b"\n"
            self._offset += len(raw) + 1
            self._lines.append((line, time))
        if not self._lines:
            return []
        head, began = self._lines[0]
        assert isinstance(head, Head)
        count = len(self._lines) + head.left_out_episodes + head.left_out_logs
        if start == 0 and (began != self._began or count < self._count):
            self.replaced += self._began is not None
            self._began, self._count = began, 0
        news = self._lines[max(start, len(self._lines) - (count - self._count)) :]
        self._count = count
        return [(line, time) for line, time in news if line is not None]

    def data(self, now: float) -> RunData:
        """Return the run as far as its record was read; for `now` see `read_run`."""
        head = self._lines[0][0] if self._lines else None
        if not isinstance(head, Head):
            raise UsageError(f"{self._file}: is empty; the run has not begun.")
        lines = [line for line, _ in self._lines]
        logs = [line for line in lines if isinstance(line, Log)]
        episodes = {line.number: line.record for line in lines if isinstance(line, NumberedEpisode)}
        trials = {line.number: line.trial for line in lines if isinstance(line, NumberedTrial)}
        if max(episodes, default=0) != len(episodes) + head.left_out_episodes:
            raise UsageError(f"{self._file}: is damaged; lines of the kind `episode` are missing.")
        if max(trials, default=0) != len(trials):
            raise UsageError(f"{self._file}: is damaged; lines of the kind `trial` are missing.")
        outcomes = [line for line in lines if isinstance(line, Outcome)]
        ends = [line for line in lines if isinstance(line, End)]
        steps = [0, *(log.step for log in logs), *(r.end_step + 1 for r in episodes.values())]
        written = [time for _, time in self._lines if time is not None]
        training = self._lines[: lines.index(ends[0]) + 1] if ends else self._lines
        return RunData(
            **vars(head),
            folder=self._folder,
            status=_status(ends[-1] if ends else None, written, now),
            step=ends[-1].step if ends else max(steps),
            logs=logs,
            times=[
                (line.step, time - written[0])
                for line, time in training
                if isinstance(line, Log | End) and time is not None
            ],
            episodes=[record for _, record in sorted(episodes.items())],
            numbers=sorted(episodes),
            trials=[trial for _, trial in sorted(trials.items())],
            outcome=outcomes[-1] if outcomes else None,
            error=ends[-1].error if ends else None,
            updated=max(written, default=None),
        )

    def _new_content(self) -> bytes:
        try:
            with self._file.open("rb") as file:
                first = file.read(len(self._first))
                size = file.seek(0, os.SEEK_END)
                if first != self._first or size < self._offset:
                    self._begin()
                file.seek(self._offset)
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise UsageError(f"{self._file}: cannot be read: {error.strerror or error}.") from error

    def _parse(self, raw: bytes) -> tuple[Line | None, float | None]:
        where = f"{self._file}, line {len(self._lines) + 1}"
        try:
            line, time = decode(json.loads(raw))
            if not self._lines and not isinstance(line, Head):
                raise StateError("the record begins without its `head`.")
        except StateError as error:
            raise UsageError(f"{where}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: is not valid JSON: {error}.") from error
        return line, time


def _status(end: End | None, written: Sequence[float], now: float) -> Status:
    if end is not None:
        return "failed" if end.error is not None else "finished" if end.finished else "stopped"
    longest = max((after - before for before, after in pairwise(written)), default=0.0)
    pause = now - max(written, default=now)
    return "silent" if pause > max(_PATIENCE, _PAUSES * longest) else "running"
