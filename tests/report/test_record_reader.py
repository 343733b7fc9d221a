"""A run's folder is read whatever state it is in, all at once or as it grows."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.record_format import FILE_NAME, End
from pulseopt_hf.errors import UsageError
from pulseopt_hf.report.record_reader import RecordReader, read_run
from pulseopt_hf.report.wording import described
from tests.report.conftest import edit_record

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
    def skip(line: dict[str, Any]) -> None:
        if line["kind"] == "log" and "pulse/skipped_steps" in line["values"]:
            skipped = sum(line["step"] >= step for step in (7, 8, 23))
            line["values"]["pulse/skipped_steps"] = skipped

    edit_record(run, skip)
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


def test_only_what_is_new_in_a_record_is_read(long: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(long, tmp_path / "copy"))
    file = folder / FILE_NAME
    *lines, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines) + last[:9])
    reader = RecordReader(folder)
    assert len(reader.read()) == len(lines)
    assert reader.data(time.time()).status != "finished"  # the last line is not whole
    # Were any of it read again, it would be no JSON.
    file.write_bytes(lines[0] + b"x" * (sum(map(len, lines)) - len(lines[0])) + last)
    started = time.process_time()
    ((end, _),) = reader.read()
    run = reader.data(time.time())
    assert time.process_time() - started < 1.0
    assert end == End(20_000, True)
    assert (run.status, len(run.episodes), reader.replaced) == ("finished", 10_000, 0)


@pytest.mark.parametrize("change", ["shorter", "another"])
def test_a_record_that_was_replaced_is_read_anew(finished: Path, change: str) -> None:
    reader = RecordReader(finished)
    reader.read()
    if change == "shorter":
        edit_record(finished, lambda line: line["kind"] == "head" or line.get("step", 60) < 20)
    else:
        edit_record(finished, lambda line: line.update(time=line["time"] + 1))
    fresh = RecordReader(finished)
    assert reader.read() == fresh.read()
    assert reader.replaced == 1
    assert reader.read() == []
    assert reader.data(0.0) == fresh.data(0.0)


def test_times_of_an_evaluation_are_no_metrics_whatever_data_set_they_are_of() -> None:
    metrics = {"eval_loss": 1.0, "eval_accuracy_mm": 0.5, "eval_news_f1": 0.25, "eval_samples": 8}
    times = ("runtime", "samples_per_second", "model_preparation_time")
    others = [f"eval_{name}{end}" for name in times for end in ("", "_mm", "_2")]
    others += ["epoch", "epoch_mm", "epoch_2", "eval_news_runtime", "eval_news_steps_per_second"]
    said = described({**dict.fromkeys(others, 2.0), **metrics})
    assert said == "eval loss 1.000, accuracy_mm 0.500, news_f1 0.250"
