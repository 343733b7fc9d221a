"""A run's folder is read whatever state it is in, and what is no run is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.record_format import FILE_NAME
from pulseopt_hf.errors import UsageError
from pulseopt_hf.report.record_reader import read_run

CONFIG = PulseOptConfig(calibration="off", lr_candidates=[0.5, 1.0, 2.0], episode_length=5)


@pytest.fixture
def run(tiny_model: Any, tiny_data: Any, arguments: Any) -> Path:
    """Return the folder of a run of 24 steps."""
    trainer = PulseOptTrainer(tiny_model(), arguments(), train_dataset=tiny_data, pulse=CONFIG)
    trainer.train()
    return Path(trainer.args.output_dir)


@pytest.fixture
def refused(run: Path) -> Callable[[], str]:
    """Return what reading the run is refused with, which is one line."""

    def read() -> str:
        with pytest.raises(UsageError) as error:
            read_run(run)
        (problem,) = error.value.problems
        assert "\n" not in problem
        assert str(run) in problem
        return problem

    return read


def rewrite(run: Path, change: Callable[[list[str]], list[str]]) -> None:
    file = run / FILE_NAME
    file.write_text("\n".join(change(file.read_text().splitlines())))


def test_a_last_line_that_was_cut_off_is_passed_over(run: Path) -> None:
    whole = read_run(run)
    file = run / FILE_NAME
    lines = file.read_bytes().splitlines(keepends=True)
    (last,) = [i for i, line in enumerate(lines) if b'"number": 5,' in line]
    file.write_bytes(b"".join(lines[:last]) + lines[last][:40])
    crashed = read_run(run)
    assert crashed.episodes == whole.episodes[:4]
    assert crashed.loss == whole.loss


def test_a_run_that_has_not_ended_goes_on_until_it_is_silent_for_long(run: Path) -> None:
    rewrite(run, lambda lines: [*lines[:10], ""])
    written = read_run(run).updated
    assert written is not None
    assert read_run(run, now=written + 60).status == "running"
    assert read_run(run, now=written + 600).status == "silent"


def test_a_run_is_read_while_it_goes_and_after_it_was_killed(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    """In a process of its own, killed with no chance to say goodbye."""
    args = arguments(max_steps=100_000)

    def train() -> None:
        sys.stdout = open(os.devnull, "w")
        PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data, pulse=CONFIG).train()

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    try:
        deadline = time.monotonic() + 60
        counts = [0]
        while len(counts) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            if (Path(args.output_dir) / FILE_NAME).exists():
                going = read_run(args.output_dir)
                assert going.status == "running"
                if len(going.episodes) > counts[-1]:
                    counts.append(len(going.episodes))
    finally:
        process.kill()
        process.join()
    killed = read_run(args.output_dir)
    assert len(killed.episodes) >= counts[-1]
    assert killed.max_steps == 100_000
    assert read_run(args.output_dir, now=time.time() + 3600).status == "silent"


def test_what_was_skipped_is_counted_for_its_episode(run: Path) -> None:
    def skip(lines: list[str]) -> list[str]:
        changed = []
        for line in lines:
            content = json.loads(line)
            if content["kind"] == "log" and "pulse/skipped_steps" in content["values"]:
                # Steps 7 and 8 were skipped, and step 23.
                skipped = (content["step"] >= 7) + (content["step"] >= 8) + (content["step"] >= 23)
                content["values"]["pulse/skipped_steps"] = skipped
            changed.append(json.dumps(content))
        return [*changed, ""]

    rewrite(run, skip)
    data = read_run(run)
    assert data.skipped_steps == 3
    assert data.skips() == [0, 2, 0, 0, 1]


def test_arms_are_summed_up(run: Path) -> None:
    data = read_run(run)
    arms = data.arms()
    assert [arm.lr_multiplier for arm in arms] == [0.5, 1.0, 2.0]
    assert sum(arm.plays for arm in arms) == 5
    assert sum(arm.steps for arm in arms) == 24
    for arm in arms:
        rewards = [r.reward for r in data.episodes if r.lr_value == arm.lr_multiplier]
        assert arm.mean == pytest.approx(sum(rewards) / len(rewards))
        assert (arm.lowest, arm.highest) == (min(rewards), max(rewards))
        assert (arm.spread is None) == (len(rewards) == 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: ["", ""], "line 1: is not valid JSON"),
        (lambda lines: [*lines[:3], "{]", *lines[3:], ""], "line 4: is not valid JSON"),
        (lambda lines: ["[" * 100_000, ""], "line 1: is not valid JSON"),
        (lambda lines: [lines[0][:30]], "is empty; the run has not begun"),
        (lambda lines: [*lines[1:], ""], "line 1: the record begins without its `head`"),
        (
            lambda lines: [lines[0].replace('"version": 2', '"version": 3'), *lines[1:], ""],
            "has format version 3, and this release of pulseopt_hf reads up to version 2. Upgrade",
        ),
        (
            lambda lines: [line for line in lines if '"number": 2' not in line] + [""],
            "lines of the kind `episode` are missing",
        ),
        (
            lambda lines: [*lines, '{"kind": "log", "step": -1, "values": {}, "time": 1}', ""],
            "`step` must be a whole number >= 0, got -1",
        ),
        (lambda lines: [*lines, '["end"]', ""], "Expected a mapping with `kind`, got list"),
    ],
)
def test_a_record_that_is_broken_is_named_with_its_line(
    run: Path, refused: Callable[[], str], change: Any, says: str
) -> None:
    rewrite(run, change)
    assert says in refused()


def test_a_kind_of_line_from_a_later_release_is_passed_over(run: Path) -> None:
    whole = read_run(run)
    rewrite(run, lambda lines: [*lines, '{"kind": "gpu", "time": 1}', ""])
    assert read_run(run).episodes == whole.episodes


def test_what_has_no_record_is_named_and_what_writes_one(tmp_path: Path, run: Path) -> None:
    (tmp_path / "file").write_text("")
    (run / FILE_NAME).unlink()
    (run / "trainer_state.json").write_text("{}")  # as a plain Trainer's run has it
    for path, says in (
        (tmp_path / "gone", "there is no such folder"),
        (tmp_path / "file", "is a file; name the run's folder"),
        (run, r"has no run record \(pulse.jsonl\). `PulseOptTrainer` and an attached"),
    ):
        with pytest.raises(UsageError, match=says):
            read_run(path)


def test_times_are_counted_until_training_ends(run: Path) -> None:
    clock = iter(range(1000))

    def tick(lines: list[str]) -> list[str]:
        logged = {"kind": "log", "step": 24, "values": {"eval_loss": 1.0}}
        lines = [*lines, json.dumps(logged)]
        return [*(json.dumps({**json.loads(line), "time": next(clock)}) for line in lines), ""]

    rewrite(run, tick)
    data = read_run(run)
    # 24 logs and Trainer's summary, with five episodes between them, then the end.
    assert data.times[0] == (1, 1)
    assert data.times[-1] == (24, 31)
    assert data.steps_per_second == 24 / 31
    assert {speed for _, speed in data.speed} == {1.0, 0.5}  # an episode's line takes a second
    assert len(data.speed) == 23
