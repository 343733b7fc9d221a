"""The command `pulseopt-hf watch`: follows a run until it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pulseopt_hf.aees.record_format import FILE_NAME, Line, Log, RunEvent
from pulseopt_hf.command_line import Parser
from pulseopt_hf.errors import UsageError, needs_extra
from pulseopt_hf.report.record_reader import News, RecordReader, require_folder
from pulseopt_hf.report.run_data import RunData
from pulseopt_hf.report.wording import counted, described, printable, shown, silence, status_line

if TYPE_CHECKING:
    from pulseopt_hf.report.live import LiveView

_PAUSE = 0.5  # seconds between two looks at the record
_MOST_PAST = 20  # lines on what was before; `report` has more
# What a run may leave in its folder before its record begins.
_BEGUN = ("trainer_state.json", "checkpoint-*", "recipe.yaml", "run.json", "train.log", "runs")


def watch(words: Sequence[str]) -> None:
    """Follow a run until training ends: live in a terminal, elsewhere line by line."""
    parser = Parser("watch")
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder, its `output_dir`")
    folder: Path = parser.parse_args(list(words)).run
    require_folder(folder)
    _require_begun(folder)
    reader = RecordReader(folder)
    view: PlainView | LiveView = PlainView()
    with contextlib.ExitStack() as stack:
        # An exit, so that a terminal gets its cursor back, with the code that a shell reports.
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        stack.callback(signal.signal, signal.SIGTERM, before)
        if sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
            with needs_extra("`watch` in a terminal", "report"):
                from pulseopt_hf.report.live import LiveView
            view = stack.enter_context(LiveView())
        while True:
            news = reader.read()
            if reader.has_begun:
                run = reader.data(time.time())
                view.show(run, news, reader.replaced)
                if run.has_ended:
                    return
            else:
                view.wait(
                    f"{printable(str(folder))}: has no record yet ({FILE_NAME}). Waiting for the "
                    "run to start; a plain Trainer writes none. Ctrl-C stops waiting."
                )
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
        """Print the news of a run whose record was replaced so often."""
        again = self._replaced is not None
        if self._replaced != replaced:
            self._replaced = replaced
            _print([_beginning(run, again)])
            # What a resumed run took over from its checkpoint has no time, and was told before.
            _print(_latest(_lines(line for line, at in news if not again or at is not None)))
        else:
            _print(_lines(line for line, _ in news))
        if run.has_ended:
            _print(_ending(run))
        elif self._silent != (run.status == "silent"):
            self._silent = not self._silent
            _print([silence(run)] if self._silent else ["The run goes on."])


def _lines(news: Iterable[Line]) -> list[str]:
    lines = []
    for line in news:
        if isinstance(line, RunEvent):
            lines.append(str(line))
        elif isinstance(line, Log) and "eval_loss" in line.values:
            lines.append(f"step {line.step}  {described(line.values)}")
    return lines


def _latest(lines: list[str]) -> list[str]:
    before = len(lines) - _MOST_PAST
    if before <= 0:
        return lines
    left_out = f"{before:,} earlier lines are not shown; `pulseopt-hf report` shows more."
    found = [line for line in lines[:before] if "calibrated: " in line]
    return [left_out, *found, *lines[before:]]


def _beginning(run: RunData, again: bool) -> str:
    first = "run" if not again else "the record starts again: run"
    line = f"{first} {printable(run.name)}: {run.max_steps:,} steps, LR set to {shown(run.base_lr)}"
    since = "" if run.resumed_from is None else f", resumed from step {run.resumed_from:,}"
    return line + since


def _ending(run: RunData) -> list[str]:
    lines = [
        f"arm x{arm.lr_multiplier:g}"
        + (f" noise {arm.noise_std:g}" if arm.noise_std else "")
        + f": {counted(arm.plays, 'episode')}, mean reward {arm.mean:+.4f}"
        + ("" if arm.spread is None else f", spread {arm.spread:.4f}")
        for arm in (run.arms() if run.has_arms else ())
    ]
    skipped = [f"skipped steps: {run.skipped_steps:,}"] if run.skipped_steps else []
    return [*lines, *skipped, status_line(run)]


def _require_begun(folder: Path) -> None:
    """Refuse a folder with files in it of which none is of a run."""
    known = (FILE_NAME, *_BEGUN)
    if any(folder.iterdir()) and not any(any(folder.glob(pattern)) for pattern in known):
        raise UsageError(
            f"{folder}: is not a run: it has files, but no {FILE_NAME} and no checkpoint. Name "
            "the `output_dir` of a run."
        )


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)
