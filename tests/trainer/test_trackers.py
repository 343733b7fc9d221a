"""What trackers show of a run, read back from what they wrote; and that it is what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pulseopt_hf import PulseOptConfig, PulseOptTrainer

KEYS = ("episode", "lr_multiplier", "learning_rate", "noise_std", "reward", "skipped_steps")


class Watched(torch.optim.AdamW):
    """Notes the LR that each update is made with, inside the update."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.used: list[float] = []

    def _init_group(self, group: Any, *args: Any, **kwargs: Any) -> Any:
        self.used.append(float(group["lr"]))
        return super()._init_group(group, *args, **kwargs)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("calibration", ["off", "ladder"])
def test_tensorboard_shows_the_lr_that_each_step_used(
    tiny_model: Any,
    tiny_data: Any,
    arguments: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibration: Any,
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    steps = 24 if calibration == "off" else 160
    args = arguments(report_to=["tensorboard"], max_steps=steps, warmup_steps=3)
    model = tiny_model()
    optimizer = Watched(model.parameters(), lr=args.learning_rate)
    config = PulseOptConfig(
        lr_candidates=[0.5, 1.0, 2.0], episode_length=4, calibration=calibration
    )
    trainer = PulseOptTrainer(
        model, args, train_dataset=tiny_data, optimizers=(optimizer, None), pulse=config
    )
    trainer.train()

    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert "train/loss" in tags
    for key in KEYS:
        assert f"train/pulse/{key}" in tags
    shown = {event.step: event.value for event in board.Scalars("train/pulse/learning_rate")}
    assert sorted(shown) == list(range(1, steps + 1))
    for step, used in enumerate(optimizer.used, 1):
        assert shown[step] == pytest.approx(used, rel=1e-6)  # event files hold float32
    assert trainer.aees is not None
    logs = trainer.aees.get_logs()
    rewards = {event.value for event in board.Scalars("train/pulse/reward")}
    for reward in logs["episode_rewards"][:-1]:
        assert any(value == pytest.approx(reward, rel=1e-6) for value in rewards)
    if calibration == "ladder":
        scales = [event.value for event in board.Scalars("train/pulse/lr_scale")]
        assert (
            scales[-1] == pytest.approx(logs["calibration_trials"][-1]["scale"]) or scales[-1] > 0
        )
    base = [event.value for event in board.Scalars("train/learning_rate")]
    assert max(base) <= args.learning_rate * (1 + 1e-6)
