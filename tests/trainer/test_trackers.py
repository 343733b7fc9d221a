"""What trackers show of a run, read back from what they wrote; and that it is what happened."""

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from transformers.integrations import TensorBoardCallback

from pulseopt_hf.trainer.card import table
from tests.conftest import Make, logged, on

KEYS = ("episode", "lr_multiplier", "learning_rate", "noise_std", "reward", "skipped_steps")
EPISODE_LENGTH = 4
STEPS = {"off": 24, "trust_region": 60}  # 24 steps are six whole episodes

PREFIX = "train/pulse/"

Shown = dict[int, float]  # value by optimizer step


def trained(make_trainer: Make, model: Any, **settings: Any) -> tuple[Any, list[float]]:
    """Return a trained Trainer, and the LR that each step used, or its last trial."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    used: list[float] = []

    def note(*_: Any) -> None:
        used[-1] = float(optimizer.param_groups[0]["lr"])

    trainer = make_trainer(model=model, optimizers=(optimizer, None), **settings)
    # The hook comes after the one that scales, so its callback behind the one that puts that on.
    begin = on("on_train_begin", lambda *_, **kwargs: optimizer.register_step_pre_hook(note))
    trainer.add_callback(begin)
    trainer.add_callback(on("on_step_begin", lambda *_, **kwargs: used.append(float("nan"))))
    trainer.train()
    assert len(used) == trainer.args.max_steps
    return trainer, used


def check_what_is_shown(shown: dict[str, Shown], trainer: Any, used: list[float]) -> None:
    """Compare what a tracker shows, by key without `pulse/`, with what happened at each step."""
    steps = range(1, len(used) + 1)
    assert set(shown) >= set(KEYS)
    assert shown["learning_rate"] == pytest.approx(dict(zip(steps, used, strict=True)), rel=1e-6)
    assert shown["skipped_steps"] == dict.fromkeys(steps, 0.0)
    logs = trainer.aees.get_logs()
    starts, ends = logs["episode_start_steps"], logs["episode_end_steps"]
    assert len(starts) > 2
    episodes: Shown = {}
    multipliers: Shown = {}
    earned: list[tuple[int, float]] = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for step in range(start + 1, end + 2):  # episodes count steps from 0, Trainer's log from 1
            episodes[step] = number + 1
            multipliers[step] = logs["selected_lr_values"][number]
        if end + 1 - start == EPISODE_LENGTH:  # a shorter one is closed after the last log
            earned.append((end + 1, logs["episode_rewards"][number]))
    after = [step for step in steps if step >= earned[0][0]]
    rewards = {step: [reward for end, reward in earned if end <= step][-1] for step in after}
    assert shown["episode"] == episodes
    assert shown["lr_multiplier"] == multipliers
    assert shown["noise_std"] == dict.fromkeys(episodes, 0.0)
    assert shown["reward"] == pytest.approx(rewards, rel=1e-6)  # event files hold float32


def events_of(folder: Path) -> EventAccumulator:
    """Return all there is in event files; by default the reader thins it out."""
    events = EventAccumulator(str(folder / "board"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def on_the_board(folder: Path) -> dict[str, Shown]:
    events = events_of(folder)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(PREFIX)]
    shown = [{event.step: event.value for event in events.Scalars(tag)} for tag in tags]
    return {tag.removeprefix(PREFIX): one for tag, one in zip(tags, shown, strict=True)}


def texts_on_the_board(folder: Path) -> dict[str, Any]:
    """Return the texts of event files by tag, each a list of events."""
    events, suffix = events_of(folder), "/text_summary"
    tags = [tag for tag in events.Tags()["tensors"] if tag.endswith(suffix)]
    return {tag.removesuffix(suffix): events.Tensors(tag) for tag in tags}


def in_trackio(run: str) -> list[dict[str, Any]]:
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "trials.db") as store:
        select = "SELECT metrics FROM metrics WHERE run_name = ? ORDER BY id"
        return [json.loads(metrics) for (metrics,) in store.execute(select, (run,))]


@pytest.fixture
def trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Training arguments that report to all three, which write below `tmp_path`."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = {"project": "trials", "run_name": tmp_path.name, "trackio_space_id": None}
    return {"report_to": ["tensorboard", "trackio", "wandb"], "max_steps": 60, **run}


@pytest.mark.parametrize("calibration", STEPS)
def test_a_tracker_shows_what_each_step_used_and_each_episode_earned(
    make_trainer: Make, tiny_model: Any, tmp_path: Path, trackers: Any, calibration: str
) -> None:
    arms = {"lr_candidates": [0.5, 1.0, 2.0], "episode_length": EPISODE_LENGTH}
    own = {"report_to": ["tensorboard"], "max_steps": STEPS[calibration], "warmup_steps": 3}
    trainer, used = trained(
        make_trainer,
        tiny_model(),
        pulse={**arms, "calibration": calibration},
        **{**trackers, **own},
    )
    check_what_is_shown(on_the_board(tmp_path), trainer, used)

    board, texts = events_of(tmp_path), texts_on_the_board(tmp_path)
    assert "args" in texts
    assert ("train/pulse/trials" in texts) == (calibration != "off")
    assert len(board.Scalars("train/loss")) == len(used)
    base = [event.value for event in board.Scalars("train/learning_rate")]
    highest = trainer.args.learning_rate
    if calibration == "off":
        rates = logged(trainer, "learning_rate")
        multipliers = logged(trainer, "pulse/lr_multiplier")
        assert logged(trainer, "pulse/learning_rate") == used  # exactly, as in all of the log
        assert used == [rate * value for rate, value in zip(rates, multipliers, strict=True)]
        rewards = [entry.get("pulse/reward") for entry in trainer.state.log_history]
        assert rewards[3:24:4] == trainer.aees.get_logs()["episode_rewards"]
    if calibration == "trust_region":
        outcome = trainer.aees.calibrator.outcome
        assert outcome.reason is None
        highest, base = outcome.learning_rate, base[outcome.step :]
        assert highest != trainer.args.learning_rate
    assert 0.8 * highest < max(base) <= highest * (1 + 1e-6)


def test_with_one_arm_only_what_varies_is_logged(train: Make) -> None:
    trainer = train(max_steps=60)
    assert trainer.aees.calibrator.outcome.reason is None
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {key for entry in steps for key in entry if "/" in key} == {"pulse/learning_rate"}
    rates = [entry["pulse/learning_rate"] for entry in steps]
    assert len(rates) == 60
    assert len(set(rates)) > 30


def test_each_tracker_shows_the_trials_of_a_calibration_once_as_its_table(
    train: Make, tmp_path: Path, trackers: dict[str, Any]
) -> None:
    trainer = train(**trackers, logging_steps=20)
    wandb.finish()
    wandb.teardown()
    calibrator = trainer.aees.calibrator
    assert calibrator.outcome.reason is None
    head = ["trial", "step", "learning rate", "outputs moved", "weights moved"]
    trials = calibrator.search.trials
    taken = [(t.step, t.learning_rate, t.movement, t.weight_movement) for t in trials]
    rows = [pytest.approx([number, *row], rel=1e-3) for number, row in enumerate(taken, 1)]
    assert len({trial.learning_rate for trial in trials}) >= 4

    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/train/pulse/trials_*.table.json")
    shown = json.loads(file.read_text())
    assert shown["columns"] == head
    assert shown["data"] == rows

    logged = in_trackio(tmp_path.name)
    (of_trackio,) = (values for values in logged if "train/pulse/trials" in values)
    assert of_trackio["train/global_step"] == 20
    assert any("train/pulse/learning_rate" in values for values in logged)
    assert of_trackio["train/pulse/trials"]["_type"] == "trackio.table"
    values = of_trackio["train/pulse/trials"]["_value"]
    assert [list(row) for row in values] == [head] * len(rows)
    assert [list(row.values()) for row in values] == rows

    (event,) = texts_on_the_board(tmp_path)["train/pulse/trials"]
    assert event.step == 20
    text = event.tensor_proto.string_val[0].decode()
    assert text == table(head, shown["data"])
    assert markdown_to_safe_html(text).count("<tr>") == len(rows) + 1  # as its page shows it


class Fragile(TensorBoardCallback):
    """Takes numbers, and breaks over text."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[str] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        texts = [value for value in logs.values() if isinstance(value, str)]
        self.given += texts
        if texts:
            raise OSError("disk full")


@pytest.mark.parametrize("first_rank", [True, False])
def test_a_tracker_that_breaks_costs_a_warning_and_other_ranks_show_nothing(
    make_trainer: Make, tmp_path: Path, trackers: Any, caplog: Any, first_rank: bool
) -> None:
    trainer = make_trainer(**{**trackers, "report_to": ["tensorboard"]})
    trainer.is_world_process_zero = lambda: first_rank
    fragile = Fragile()
    trainer.callback_handler.callbacks.insert(0, fragile)
    trainer.train()
    assert trainer.state.global_step == 60
    assert trainer.aees.calibrator.outcome.reason is None
    warnings = [record.message for record in caplog.records if "trials" in record.message]
    said = "TensorBoardCallback did not take the trials: OSError: disk full"
    assert warnings == [said] * first_rank
    assert len(fragile.given) == first_rank
    if first_rank:  # the one behind it got its table
        assert len(texts_on_the_board(tmp_path)["train/pulse/trials"]) == 1
