"""A run's folder is read whatever state it is in, and what is no run is named."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.run_record import FILE_NAME
from pulseopt_hf.errors import UsageError
from pulseopt_hf.report.reading import read_run, require_episodes

CONFIG = PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0], episode_length=5)


@pytest.fixture
def run(tiny_model: Any, tiny_data: Any, arguments: Any) -> Path:
    """Return the folder of a run of 24 steps with a record, two checkpoints and a state."""
    args = arguments(save_strategy="steps", save_steps=10)
    trainer = PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data, pulse=CONFIG)
    trainer.train()
    trainer.save_state()
    assert trainer.aees is not None
    logs = trainer.aees.get_logs()
    (Path(args.output_dir) / "episodes.json").write_text(json.dumps(logs))
    return Path(args.output_dir)


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


def test_a_run_without_a_record_is_read_from_what_trainer_and_recipes_save(run: Path) -> None:
    whole = read_run(run)
    (run / FILE_NAME).unlink()
    old = read_run(run)
    # The published log keys, which these files have, know nothing of an episode's LR.
    assert old.episodes == [replace(record, learning_rate=None) for record in whole.episodes]
    assert old.logs == whole.logs
    assert (old.status, old.step, old.max_steps) == ("finished", 24, 24)
    assert old.base_lr is None  # the first LR that was logged need not be the base LR
    (run / "recipe.yaml").write_text("learning_rate: 3e-3\n")
    assert read_run(run).base_lr == 3e-3
    assert old.knobs["lr_candidates"] == [0.5, 1.0, 2.0]


def test_a_checkpoint_alone_is_enough(run: Path) -> None:
    whole = read_run(run)
    for name in (FILE_NAME, "trainer_state.json", "episodes.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint-24")
    old = read_run(run)
    assert old.episodes == whole.episodes[:4]
    assert (old.status, old.step, old.max_steps) == ("stopped", 20, 24)
    assert [step for step, _ in old.loss] == list(range(1, 21))


def test_a_calibration_is_read_from_a_checkpoint(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    config = PulseOptConfig(calibration="trust_region")
    args = arguments(max_steps=60, save_strategy="steps", save_steps=60)
    trainer = PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data, pulse=config)
    trainer.train()
    folder = Path(args.output_dir)
    (folder / FILE_NAME).unlink()
    old = read_run(folder)
    assert trainer.aees is not None
    assert trainer.aees.calibrator is not None
    assert old.trials == trainer.aees.calibrator.search.trials != []
    assert old.outcome == trainer.aees.calibrator.outcome
    assert old.calibrated_lr == trainer.aees.calibrator.search.learning_rate is not None


def test_a_plain_trainers_run_has_a_loss_and_no_episodes(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    args = arguments(save_strategy="steps", save_steps=24)
    Trainer(tiny_model(), args, train_dataset=tiny_data).train()
    plain = read_run(args.output_dir)
    assert len(plain.loss) == 24
    assert plain.episodes == []
    assert plain.knobs == {}
    with pytest.raises(UsageError, match="has no finished episode at step 24 of 24"):
        require_episodes(plain)


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
        rewards = [r.reward for r in data.episodes if r.name == arm.name]
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


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("trainer_state.json", "{", "is not valid JSON"),
        ("trainer_state.json", "[]", "must hold a mapping, got list"),
        ("trainer_state.json", "{}", "has no `global_step`"),
        ("episodes.json", "{", "is not valid JSON"),
        ("episodes.json", "{}", "has no `selected_lr_indices`"),
    ],
)
def test_an_older_runs_broken_file_is_named(
    run: Path, refused: Callable[[], str], name: str, text: str, says: str
) -> None:
    (run / FILE_NAME).unlink()
    (run / name).write_text(text)
    problem = refused()
    assert name in problem
    assert says in problem


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, says in (
        ("gone", "there is no such folder"),
        ("file", "is a file; name the run's folder"),
        ("empty", "is not a run: it has no pulse.jsonl, no trainer_state.json and no checkpoint"),
    ):
        with pytest.raises(UsageError, match=says):
            read_run(tmp_path / name)
