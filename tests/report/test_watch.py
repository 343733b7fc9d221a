"""`pulseopt-hf watch` follows real runs, through a pipe and in a real terminal."""

from __future__ import annotations

import fcntl
import io
import multiprocessing
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyte
import pytest
from rich.console import Console
from transformers import TrainerCallback

from pulseopt_hf import PulseOptTrainer
from pulseopt_hf.aees.record_format import FILE_NAME
from pulseopt_hf.cli import main
from pulseopt_hf.recipes.lines import RunLines
from pulseopt_hf.report.live import picture
from pulseopt_hf.report.record_reader import read_run
from tests.report.conftest import edit_record

WATCH = [sys.executable, "-m", "pulseopt_hf", "watch"]
KNOBS = {"lr_candidates": [0.5, 1.0, 2.0], "calibration": "trust_region", "episode_length": 5}
COLUMNS, ROWS = 120, 45

pytestmark = pytest.mark.timeout(600)


class WaitAtStep(TrainerCallback):
    """Holds training after a step until a file is there, or raises there if told to."""

    def __init__(self, step: int, go: Path, error: bool) -> None:
        self.step, self.go, self.error = step, go, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            while not self.go.exists():
                time.sleep(0.02)
            if self.error:
                raise RuntimeError("the disk is on fire")


class Waiting(PulseOptTrainer):
    """Waits after step 50 until the file `go` is in the folder above the run's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        go = Path(self.args.output_dir).parent / "go"
        self.add_callback(WaitAtStep(50, go, "burning" in self.args.output_dir))


@pytest.fixture
def train_beside(train: Any) -> Iterator[Callable[[Path], None]]:
    """Return a function that trains 100 steps in a process of its own; see `Waiting`."""
    started = []

    def start(folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        settings = {"max_steps": 100, "learning_rate": 1e-4}
        process = context.Process(target=train, args=(folder, KNOBS, Waiting), kwargs=settings)
        process.start()
        started.append(process)

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def follow() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts `watch` in a process, with its output in a pipe."""
    started = []

    def start(folder: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*WATCH, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TERM": "xterm-256color", "FORCE_COLOR": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Terminal:
    """A real pseudo-terminal with `watch` in it, and a screen that shows what it writes."""

    def __init__(self, command: list[str]) -> None:
        self._master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)
        self.written = b""
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)

    def read(self) -> bool:
        """Take in what was written, and return whether there may be more."""
        try:
            content = os.read(self._master, 65536)
        except OSError:  # EIO: the last process has closed the terminal
            return False
        self.written += content
        self._stream.feed(content)
        return bool(content)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).strip()

    def read_until(self, words: str) -> str:
        while words not in " ".join(self.text.split()):  # a long line goes on below
            ready, _, _ = select.select([self._master], [], [], 120)
            assert ready, self.text
            assert self.read(), self.text
        return self.text

    def read_to_end(self) -> str:
        while self.read():
            pass
        self.process.wait()
        return self.text

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened = []

    def start(folder: Path, command: list[str] = WATCH) -> Terminal:
        opened.append(Terminal([*command, str(folder)]))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def read_until(stream: IO[str], words: str) -> list[str]:
    lines = []
    while not lines or words not in lines[-1]:
        lines.append(stream.readline())
        assert lines[-1], "".join(lines)
    return lines


def test_a_pipe_gets_a_line_for_each_piece_of_news_while_the_run_goes_on(
    tmp_path: Path, train_beside: Any, follow: Any
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    process = follow(folder)
    (waiting,) = read_until(process.stdout, "\n")
    assert f"{folder}: has no record yet (pulse.jsonl). Waiting" in waiting
    train_beside(folder)
    seen = read_until(process.stdout, "episode   4")
    assert read_run(folder).status == "running"  # held after step 50
    (tmp_path / "go").touch()
    rest, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    lines = "".join([*seen, rest]).splitlines()
    assert "\x1b" not in "".join(lines)

    run = read_run(folder)
    assert lines[0] == "run run: 100 steps, LR set to 0.0001"
    assert [line[:8] for line in lines if line.startswith("trial ")] == [
        f"trial {number:>2}" for number in range(1, len(run.trials) + 1)
    ]
    (found,) = [line for line in lines if line.startswith("Learning rate calibrated: ")]
    assert f"0.0001 was set, {run.calibrated_lr:.3g} is used" in found
    episodes = [line for line in lines if line.startswith("episode ")]
    assert len(episodes) == len(run.episodes)
    rates = dict(run.effective_lrs)
    for line, record in zip(episodes, run.episodes, strict=True):
        assert f"= {rates[record.end_step + 1]:.2e} " in line
        assert line.endswith(f"reward {record.reward:+.4f}")
    evaluated = [line for line in lines if "eval loss" in line]
    assert [line.split()[:2] for line in evaluated[:2]] == [["step", "20"], ["step", "40"]]
    plays = [line for line in lines if line.startswith("arm ")]
    assert len(plays) == len(run.arms())
    assert f"{run.arms()[0].plays} episode" in plays[0]
    assert lines[-1] == "Finished: 100 of 100 steps."


def test_a_run_and_watch_say_the_same_of_an_episode(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record has the LR of its last step, whether that was logged or not."""
    told: list[str] = []

    class Telling(PulseOptTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(RunLines(self, told.append))

    folder = train(tmp_path / "run", KNOBS, Telling, max_steps=100, logging_steps=4)
    capsys.readouterr()
    assert main(["watch", str(folder)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("episode ")]
    assert lines == [line for line in told if line.startswith("episode ")]
    assert all(re.search(r"LR x\S+ += \d\.\d\de-\d\d ", line) for line in lines)
    assert len(lines) > 5


def test_a_terminal_shows_the_run_live_and_keeps_the_last_picture(
    tmp_path: Path, train_beside: Any, terminal: Any
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    window = terminal(folder)
    window.read_until("Waiting for the run to start")
    train_beside(folder)
    window.read_until("step 49 of 100")  # the last one logged
    held = window.read_until("arm now")  # below it, and read later where a read ends in between
    assert "run  running" in held
    assert "Finished" not in held
    (tmp_path / "go").touch()
    last = window.read_to_end()
    assert window.process.returncode == 0
    run = read_run(folder)
    assert "run  finished" in last
    assert "step 100 of 100 ━━━" in last
    assert last.endswith("Finished: 100 of 100 steps.")
    assert last.count("run  ") == 1  # drawn over itself, not below itself
    for arm in run.arms():
        row = next(line for line in last.splitlines() if f"■ ×{arm.lr_multiplier:g} " in line)  # noqa: RUF001
        assert f" {arm.plays} " in row
        assert f"{arm.mean:+.4f}" in row
    for trial in run.trials:
        assert f"{trial.learning_rate:.2e}" in last
    assert re.search(rf"found +{run.calibrated_lr:.2e}", last)
    (curve,) = [line for line in last.splitlines() if line.startswith("loss ▇") or "loss █" in line]
    assert curve.count("▁") > 3
    assert window.written.index(b"\x1b[?25l") < window.written.rindex(b"\x1b[?25h")  # the cursor


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGINT, 1, "pulseopt-hf: interrupted."), (signal.SIGTERM, 128 + signal.SIGTERM, "")],
)
def test_a_signal_ends_the_command_and_gives_the_cursor_back(
    sent: signal.Signals, code: int, said: str, finished: Path, terminal: Any
) -> None:
    edit_record(finished, lambda line: line["kind"] != "end")
    window = terminal(finished)
    window.read_until("Arms")
    if sent == signal.SIGINT:
        window.type(b"\x03")  # Ctrl-C
    else:
        window.process.send_signal(sent)
    assert said in window.read_to_end()
    assert window.process.returncode == code
    assert b"\x1b[?25h" in window.written[window.written.rindex(b"\x1b[?25l") :]


def test_a_run_that_crashes_is_said_to_have_failed(
    tmp_path: Path, train_beside: Any, follow: Any, terminal: Any
) -> None:
    folder = tmp_path / "burning"
    folder.mkdir()
    process, window = follow(folder), terminal(folder)
    train_beside(folder)
    read_until(process.stdout, "episode   4")
    (tmp_path / "go").touch()
    rest, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    ending = "Ended by RuntimeError at step 50: 50 of 100 steps."
    assert rest.splitlines()[-1] == ending
    last = window.read_to_end()
    assert "burning  failed" in last
    assert last.endswith(ending)


def test_a_killed_run_is_waited_for_and_followed_when_it_is_resumed(
    finished: Path, follow: Any
) -> None:
    """Its record is replaced then; what it took over from the checkpoint is told only once."""
    whole = (finished / FILE_NAME).read_bytes()

    def killed(line: dict[str, Any]) -> bool:
        line["time"] = line["time"] - 7200
        return line["kind"] != "end" and line.get("step", 0) < 70 and line.get("end_step", 0) < 70

    edit_record(finished, killed)
    process = follow(finished)
    seen = read_until(process.stdout, "the run was killed or is waiting")
    assert any(line.startswith("episode   9 ") for line in seen)
    (finished / FILE_NAME).write_bytes(whole)

    def resumed(line: dict[str, Any]) -> None:
        if line["kind"] == "head":
            line["resumed_from"] = 45
        elif line.get("step", 0) <= 45 and line.get("end_step", 0) < 45:
            line["time"] = None

    edit_record(finished, resumed)
    rest, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    first, *others = rest.splitlines()
    assert first.startswith("the record starts again: run calibrated: 100 steps")
    assert first.endswith("resumed from step 45")
    assert not any(line.startswith(("trial", "Learning rate", "episode   4 ")) for line in others)
    assert any(line.startswith("episode   5 ") for line in others)
    assert others[-1] == "Finished: 100 of 100 steps."


def test_a_run_that_has_ended_is_shown_at_once_with_its_latest_lines(
    long: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.process_time()
    assert main(["watch", str(long)]) == 0
    assert time.process_time() - started < 10
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "9,980 earlier lines are not shown; `pulseopt-hf report` shows more."
    assert lines[2].startswith("episode 9981 ")
    assert lines[21].startswith("episode 10000 ")
    assert lines[-1] == "Finished: 20,000 of 20,000 steps."


def test_names_are_shown_as_they_are_and_obeyed_by_no_terminal(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[red]x[/red]\x1b[31m\n\x07\u202e:smile:"
    edit_record(finished, lambda line: line.update(name=name) if line["kind"] == "head" else None)
    shown = "[red]x[/red]\ufffd[31m\ufffd\ufffd\ufffd:smile:"
    assert main(["watch", str(finished)]) == 0
    assert capsys.readouterr().out.startswith(f"run {shown}: 100 steps")
    console = Console(file=io.StringIO(), width=COLUMNS)
    console.print(picture(read_run(finished), console))
    assert console.file.getvalue().startswith(f"{shown}  finished")  # type: ignore[attr-defined]


def test_what_is_no_run_is_refused_in_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for words, said in (
        (["gone"], "gone: there is no such folder"),
        (["photos"], "photos: is not a run: it has files, but no pulse.jsonl"),
        ([], "`pulseopt-hf watch --help`"),
        (["photos", "photos"], "`pulseopt-hf watch --help` shows how"),
    ):
        assert main(["watch", *(str(tmp_path / word) for word in words)]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert (captured.out, captured.err.count("\n")) == ("", 1)
    record = finished / FILE_NAME
    record.write_text(record.read_text().replace('{"kind": "episode"', "{episode", 1))
    assert main(["watch", str(finished)]) == 2
    assert "is not valid JSON" in capsys.readouterr().err


def test_without_rich_there_are_lines_and_a_terminal_is_told_of_the_extra(
    finished: Path, terminal: Any
) -> None:
    code = (
        "import sys; sys.modules['rich'] = None\n"
        "from pulseopt_hf.cli import main\n"
        "sys.exit(main(['watch', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run([*command, str(finished)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Finished: 100 of 100 steps."
    window = terminal(finished, command)
    said = " ".join(window.read_to_end().split())
    needs = "`watch` in a terminal needs `pip install 'pulseopt-hf[report]'`: No module named 'rich"
    assert needs in said
    assert window.process.returncode == 2


def test_an_encoding_without_the_signs_of_a_name_does_not_end_the_command(finished: Path) -> None:
    edit_record(finished, lambda line: line.update(name="λ") if line["kind"] == "head" else None)
    done = subprocess.run(
        [*WATCH, str(finished)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"run ?: 100 steps")


def test_a_reader_that_leaves_ends_the_command_quietly(finished: Path) -> None:
    done = subprocess.run(
        f"{' '.join(WATCH)} '{finished}' | head -n 1", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "run calibrated: 100 steps, LR set to 0.0001\n"
    assert done.stderr == ""
