"""What trackers show of a run, read back from what they wrote; and that it is what happened."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from pulseopt_hf.trainer.card import table

KEYS = ("episode", "lr_multiplier", "learning_rate", "noise_std", "reward", "skipped_steps")
EPISODE_LENGTH = 4
STEPS = {"off": 24, "trust_region": 60}  # 24 steps are six whole episodes

Shown = dict[int, float]  # value by optimizer step


class UsedLR(TrainerCallback):
    """Notes the LR of each step, or of its last trial: its hook comes after the one that scales."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.used: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer.register_step_pre_hook(self.note)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.used.append(float("nan"))

    def note(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.used[-1] = float(optimizer.param_groups[0]["lr"])


def trained(model: Any, args: Any, data: Any, calibration: Any = "off") -> tuple[Any, list[float]]:
    """Return a trained Trainer, and the LR that each of its optimizer steps used."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    config = PulseOptConfig(
        lr_candidates=[0.5, 1.0, 2.0], episode_length=EPISODE_LENGTH, calibration=calibration
    )
    trainer = PulseOptTrainer(
        model, args, train_dataset=data, optimizers=(optimizer, None), pulse=config
    )
    watch = UsedLR(optimizer)
    trainer.add_callback(watch)  # behind the callback that puts the arm's hooks on
    trainer.train()
    assert len(watch.used) == args.max_steps
    return trainer, watch.used


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
    rewards = {
        step: [reward for end, reward in earned if end <= step][-1]
        for step in steps
        if step >= earned[0][0]
    }
    assert shown["episode"] == episodes
    assert shown["lr_multiplier"] == multipliers
    assert shown["noise_std"] == dict.fromkeys(episodes, 0.0)
    assert shown["reward"] == pytest.approx(rewards, rel=1e-6)  # event files hold float32


@pytest.mark.parametrize("calibration", ["off", "trust_region"])
def test_tensorboard_shows_what_each_step_used_and_each_episode_earned(
    tiny_model: Any,
    tiny_data: Any,
    arguments: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibration: Any,
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    args = arguments(report_to=["tensorboard"], max_steps=STEPS[calibration], warmup_steps=3)
    trainer, used = trained(tiny_model(), args, tiny_data, calibration)

    # As many events as there are: by default the reader thins them out.
    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"scalars": 0})
    board.Reload()
    prefix = "train/pulse/"
    shown = {
        tag.removeprefix(prefix): {event.step: event.value for event in board.Scalars(tag)}
        for tag in board.Tags()["scalars"]
        if tag.startswith(prefix)
    }
    check_what_is_shown(shown, trainer, used)
    assert len(board.Scalars("train/loss")) == len(used)
    base = [event.value for event in board.Scalars("train/learning_rate")]
    highest = args.learning_rate
    if calibration == "trust_region":
        outcome = trainer.aees.calibrator.outcome
        assert outcome.reason is None
        highest, base = outcome.learning_rate, base[outcome.step :]
        assert highest != args.learning_rate
    assert 0.8 * highest < max(base) <= highest * (1 + 1e-6)


def test_with_one_arm_only_what_varies_is_logged(trainer_of: Any, arguments: Any) -> None:
    args = arguments(max_steps=STEPS["trust_region"])
    trainer = trainer_of(args=args)
    trainer.train()
    assert trainer.aees.calibrator.outcome.reason is None
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {key for entry in steps for key in entry if "/" in key} == {"pulse/learning_rate"}
    rates = [entry["pulse/learning_rate"] for entry in steps]
    assert len(rates) == args.max_steps
    assert len(set(rates)) > args.max_steps / 2


def test_trackio_shows_them_in_its_local_store(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    # Without a Space, which was the default at first, runs stay on this machine.
    args = arguments(report_to=["trackio"], project="pulse", run_name="arms", trackio_space_id=None)
    trainer, used = trained(tiny_model(), args, tiny_data)

    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "pulse.db") as store:
        rows = store.execute("SELECT metrics FROM metrics WHERE run_name = 'arms' ORDER BY id")
        logged = [json.loads(metrics) for (metrics,) in rows]
    check_what_is_shown(by_key(logged), trainer, used)


def test_wandb_is_given_them_with_the_step(
    tiny_model: Any,
    tiny_data: Any,
    arguments: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged: list[dict[str, Any]] = []
    log = wandb.Run.log

    def noted(run: Any, data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        logged.append(data)
        log(run, data, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", noted)
    trainer, used = trained(tiny_model(), arguments(report_to=["wandb"]), tiny_data)
    wandb.finish()
    wandb.teardown()
    check_what_is_shown(by_key(logged), trainer, used)


@pytest.fixture
def trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Training arguments that report to all three, which write below `tmp_path`."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = ["tensorboard", "trackio", "wandb"]
    run = {"project": "trials", "run_name": tmp_path.name, "trackio_space_id": None}
    return {"report_to": names, "max_steps": STEPS["trust_region"], **run}


def close_wandb() -> None:
    import wandb

    wandb.finish()
    wandb.teardown()


def texts_on_the_board(folder: Path) -> dict[str, Any]:
    """Return the texts of event files by tag, each a list of events."""
    board = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    board.Reload()
    suffix = "/text_summary"
    tags = [tag for tag in board.Tags()["tensors"] if tag.endswith(suffix)]
    return {tag.removesuffix(suffix): board.Tensors(tag) for tag in tags}


def test_each_tracker_shows_the_trials_of_a_calibration_once_as_its_table(
    tiny_model: Any, tiny_data: Any, arguments: Any, tmp_path: Path, trackers: dict[str, Any]
) -> None:
    args = arguments(**trackers, logging_steps=20)
    trainer = PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data)
    trainer.train()
    close_wandb()
    calibrator = trainer.aees.calibrator
    assert calibrator.outcome.reason is None
    head = ["trial", "step", "learning rate", "outputs moved", "weights moved"]
    rows = [
        pytest.approx(
            [number, trial.step, trial.learning_rate, trial.movement, trial.weight_movement],
            rel=1e-3,
        )
        for number, trial in enumerate(calibrator.search.trials, 1)
    ]
    assert len(rows) >= 4
    assert len({trial.learning_rate for trial in calibrator.search.trials}) >= 4

    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/train/pulse/trials_*.table.json")
    shown = json.loads(file.read_text())
    assert shown["columns"] == head
    assert shown["data"] == rows

    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "trials.db") as store:
        found = store.execute("SELECT metrics FROM metrics WHERE run_name = ?", (tmp_path.name,))
        logged = [json.loads(metrics) for (metrics,) in found]
    (of_trackio,) = (values for values in logged if "train/pulse/trials" in values)
    assert of_trackio["train/global_step"] == 20
    assert of_trackio["train/pulse/trials"]["_type"] == "trackio.table"
    values = of_trackio["train/pulse/trials"]["_value"]
    assert [list(row) for row in values] == [head] * len(rows)
    assert [list(row.values()) for row in values] == rows

    (event,) = texts_on_the_board(tmp_path / "board")["train/pulse/trials"]
    assert event.step == 20
    text = event.tensor_proto.string_val[0].decode()
    assert text == table(head, shown["data"])
    assert markdown_to_safe_html(text).count("<tr>") == len(rows) + 1  # as its page shows it


def test_without_a_calibration_trackers_get_no_table(
    tiny_model: Any, tiny_data: Any, arguments: Any, tmp_path: Path, trackers: dict[str, Any]
) -> None:
    args = arguments(**{**trackers, "report_to": ["tensorboard"]})
    trained(tiny_model(), args, tiny_data)
    texts = texts_on_the_board(tmp_path / "board")
    assert "args" in texts
    assert "train/pulse/trials" not in texts


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
    tiny_model: Any,
    tiny_data: Any,
    arguments: Any,
    tmp_path: Path,
    trackers: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    first_rank: bool,
) -> None:
    args = arguments(**{**trackers, "report_to": ["tensorboard"]})
    trainer = PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data)
    trainer.is_world_process_zero = lambda: first_rank
    fragile = Fragile()
    trainer.callback_handler.callbacks.insert(0, fragile)
    trainer.train()
    assert trainer.state.global_step == args.max_steps
    assert trainer.aees.calibrator.outcome.reason is None
    warnings = [record.message for record in caplog.records if "trials" in record.message]
    said = "TensorBoardCallback did not take the trials: OSError: disk full"
    assert warnings == [said] * first_rank
    assert len(fragile.given) == first_rank
    if first_rank:  # the one behind it got its table
        assert len(texts_on_the_board(tmp_path / "board")["train/pulse/trials"]) == 1


def by_key(logged: list[dict[str, Any]]) -> dict[str, Shown]:
    """Turn what was logged together, with its step, into the values of each `pulse/` key."""
    prefix = "train/pulse/"
    shown: dict[str, Shown] = {}
    for values in logged:
        for key, value in values.items():
            if key.startswith(prefix):
                of_key = shown.setdefault(key.removeprefix(prefix), {})
                assert values["train/global_step"] not in of_key
                of_key[values["train/global_step"]] = value
    return shown
