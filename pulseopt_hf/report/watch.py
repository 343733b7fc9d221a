"""The command `pulseopt-hf watch`: follows a run until it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

from pulseopt_hf.aees.calibration import Outcome
from pulseopt_hf.aees.run_record import FILE_NAME, Line, Log, NumberedEpisode, NumberedTrial
from pulseopt_hf.command_line import Parser
from pulseopt_hf.errors import UsageError
from pulseopt_hf.report.arms import shown
from pulseopt_hf.report.data import RunData
from pulseopt_hf.report.reading import read_run, require_folder
from pulseopt_hf.report.record_file import RecordFile
from pulseopt_hf.report.tables import clock, progress, status_line
from pulseopt_hf.report.wording import (
    described,
    episode_line,
    printable,
    trial_line,
)

ENDED = ("finished", "stopped", "failed")
_PAUSE = 0.5  # seconds between two looks at the record
_MOST_PAST = 20  # lines on what was before; `report` has all
# What a run may leave in its folder before its record begins.
_BEGUN = ("trainer_state.json", "checkpoint-*", "recipe.yaml", "run.json", "train.log", "runs")

News = Sequence[tuple[Line, float | None]]


class View(Protocol):
    """Shows a run to a person."""

    def wait(self, line: str) -> None:
        """Say what is waited for; called again as long as it is."""

    def show(self, run: RunData, news: News, replaced: int) -> None:
        """Show a run.

        Args:
            run: as it is now.
            news: the lines of the record since the last call, and when they were written.
            replaced: how often the record was replaced so far.
        """


def watch(words: Sequence[str]) -> None:
    """Follow a run, in a terminal live and else line by line, until training ends.

    Args:
        words: the run's folder.

    Raises:
        UsageError: the folder is no run, its record is damaged, or rich is not installed.
    """
    parser = Parser("watch")
    parser.add_argument("run", metavar="RUN", help="the run's folder, its `output_dir`")
    folder = Path(parser.parse_args(list(words)).run)
    require_folder(folder)
    _require_begun(folder)
    live = sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    with _live_view() if live else contextlib.nullcontext(PlainView()) as view, _exit_at_sigterm():
        _follow(folder, view)


def _follow(folder: Path, view: View) -> None:
    record = RecordFile(folder)
    while True:
        news = record.read()
        if record.head is not None:
            run = record.data(time.time())
            view.show(run, news, record.replaced)
            if run.status in ENDED:
                return
        else:
            saved = _saved(folder)
            if saved is not None and saved.status == "finished":
                view.show(saved, [(log, None) for log in saved.logs], record.replaced)
                return
            view.wait(_awaited(folder, saved))
        time.sleep(_PAUSE)


class PlainView:
    """Prints one line for each piece of news, without escape codes."""

    def __init__(self) -> None:
        self._waiting = False
        self._replaced: int | None = None  # of the record that was shown last
        self._silent = False

    def wait(self, line: str) -> None:
        """Say once what is waited for."""
        if not self._waiting:
            _print([line])
        self._waiting = True

    def show(self, run: RunData, news: News, replaced: int) -> None:
        """Print the news."""
        if self._replaced != replaced:
            again = self._replaced is not None
            self._replaced = replaced
            _print([_begun(run, again)])
            # What a resumed run took over from its checkpoint has no time, and was told before.
            told = [line for line, at in news if at is None] if again else []
            self._lines(run, told)
            _print(
                _latest(
                    self._lines(run, [line for line, at in news if not again or at is not None])
                )
            )
        else:
            _print(self._lines(run, [line for line, _ in news]))
        if run.status in ENDED:
            _print(_ending(run))
        elif self._silent != (run.status == "silent"):
            self._silent = not self._silent
            _print([silence(run)] if self._silent else ["It goes on."])

    def _lines(self, run: RunData, news: Iterable[Line]) -> list[str]:
        lines = []
        for line in news:
            if isinstance(line, NumberedTrial):
                lines.append(trial_line(line.number, line.trial))
            elif isinstance(line, Outcome):
                lines.append(str(line))
            elif isinstance(line, NumberedEpisode):
                lines.append(episode_line(line.number, line.record))
            elif isinstance(line, Log) and "eval_loss" in line.values:
                lines.append(f"step {line.step}  {described(evaluated(line))}")
        return lines


def _latest(lines: list[str]) -> list[str]:
    before = len(lines) - _MOST_PAST
    if before <= 0:
        return lines
    left_out = f"{before:,} lines before these are left out; `pulseopt-hf report` has all."
    found = [line for line in lines[:before] if "calibrated: " in line]
    return [left_out, *found, *lines[before:]]


def evaluated(line: Log) -> dict[str, object]:
    """Return what of a log entry an evaluation measured."""
    return {key: value for key, value in line.values.items() if key.startswith("eval_")}


def silence(run: RunData) -> str:
    """Say that a run has written nothing for long."""
    since = "" if run.updated is None else f" since {clock(run.updated)}"
    return (
        f"Nothing was written{since}, at step {progress(run)}: the run was killed, or it waits. "
        "Ctrl-C ends this command, not the run."
    )


def _begun(run: RunData, again: bool) -> str:
    first = "run" if not again else "the record was begun anew: run"
    line = f"{first} {printable(run.name)}: {run.max_steps:,} steps"
    if run.base_lr is not None:
        line += f", LR set to {shown(run.base_lr)}"
    if run.resumed_from is not None:
        line += f", resumed from step {run.resumed_from:,}"
    return line


def _ending(run: RunData) -> list[str]:
    lines = [
        f"arm x{arm.lr_multiplier:g}"
        + (f" noise {arm.noise_std:g}" if arm.noise_std else "")
        + f": {arm.plays:,} episode{'' if arm.plays == 1 else 's'}, mean reward {arm.mean:+.4f}"
        + ("" if arm.spread is None else f", spread {arm.spread:.4f}")
        for arm in run.arms()
    ]
    if run.skipped_steps:
        lines.append(f"skipped steps: {run.skipped_steps:,}")
    return [*lines, status_line(run)]


def _awaited(folder: Path, saved: RunData | None) -> str:
    name = printable(str(folder))
    since = "" if saved is None else f" since its checkpoint at step {progress(saved)}"
    return (
        f"{name}: has no record yet ({FILE_NAME}){since}. Waiting for the run to begin; Ctrl-C "
        "ends this."
    )


def _saved(folder: Path) -> RunData | None:
    """Read a run that keeps no record from what Trainer saved, or `None` if it saved nothing."""
    saved = [*folder.glob("trainer_state.json"), *folder.glob("checkpoint-*/trainer_state.json")]
    return read_run(folder) if saved else None


def _require_begun(folder: Path) -> None:
    """Refuse a folder that holds something, but no run and none that is about to begin."""
    known = (FILE_NAME, *_BEGUN)
    if any(folder.iterdir()) and not any(any(folder.glob(pattern)) for pattern in known):
        raise UsageError(
            f"{folder}: is not a run: it has files, but no {FILE_NAME} and no checkpoint. Name "
            "the `output_dir` of a run."
        )


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


@contextlib.contextmanager
def _exit_at_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exit, so that a terminal gets its cursor back."""

    def leave(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)  # as a shell reports it

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _live_view() -> contextlib.AbstractContextManager[View]:
    try:
        from pulseopt_hf.report.live import LiveView
    except ModuleNotFoundError as error:
        raise UsageError(
            f"`watch` in a terminal needs {error.name}, which is not installed: "
            "pip install 'pulseopt-hf[report]'. Lines alone need nothing: "
            "pulseopt-hf watch RUN | cat."
        ) from error
    return LiveView()
