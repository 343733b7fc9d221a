"""Attaching the callback, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from transformers import Trainer

from pulseopt_hf import PulseOptCallback, PulseOptConfig
from tests.conftest import Make, callback_trainer, history, logged, parameters_equal

PULSE = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=4)


def test_a_callback_with_arms_that_was_never_attached_raises_at_the_start_and_says_how(
    train: Make,
) -> None:
    with pytest.raises(RuntimeError, match=r"PulseOptCallback\(config\).attach\(trainer\)"):
        train("events", PULSE)


def test_a_callback_class_in_the_list_calibrates(train: Make) -> None:
    trainer = train("stock", max_steps=60, learning_rate=1e-4, callbacks=[PulseOptCallback])
    assert trainer.lr_scheduler.base_lrs[0] > 1e-3
    assert "pulseopt_hf" not in vars(trainer.optimizer)["step"].__code__.co_filename


def test_a_callback_in_the_list_and_attached_is_there_once(make_trainer: Make) -> None:
    callback = PulseOptCallback(PULSE)
    trainer = make_trainer("stock", callbacks=[callback])
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert callback.aees is trainer.aees
    assert len(trainer.aees.get_logs()["episode_rewards"]) == 6


def test_attaching_twice_or_to_a_trainer_that_has_aees_is_refused(
    make_trainer: Make, tiny_model: Any
) -> None:
    for trainer, error, message in (
        (make_trainer("attached", PULSE), RuntimeError, "has AEES already"),
        (make_trainer(), RuntimeError, "PulseOptTrainer has AEES already"),
        (tiny_model(), TypeError, "must be a Trainer"),
    ):
        with pytest.raises(error, match=message):
            PulseOptCallback(PULSE).attach(trainer)


def train_unseen(trainer: Any) -> Any:
    """Train by a training step that is none of ours."""
    trainer.training_step = lambda *args, **kwargs: Trainer.training_step(trainer, *args, **kwargs)
    trainer.train()
    return trainer


def test_a_trainer_whose_training_step_went_another_way_is_refused_naming_the_subclass(
    make_trainer: Make,
) -> None:
    with pytest.raises(RuntimeError, match="stands in the place of the `training_step`"):
        train_unseen(make_trainer("attached", PULSE))


@pytest.mark.parametrize("calibration", ["auto", "off"])
def test_without_arms_a_training_step_that_is_not_seen_trains_as_the_stock_trainer(
    make_trainer: Make, calibration: str, caplog: pytest.LogCaptureFixture
) -> None:
    stock = train_unseen(make_trainer("stock", max_steps=60))
    ours = train_unseen(make_trainer(pulse={"calibration": calibration}, max_steps=60))
    assert parameters_equal(ours.model, stock.model)
    entries = [
        {key: value for key, value in entry.items() if not key.startswith("pulse/")}
        for entry in history(ours)
    ]
    assert entries == history(stock)
    said = "the loss of `training_step` was not seen" in caplog.text
    assert said == (calibration == "auto")


def test_a_trainer_that_overrides_its_steps_is_seen_all_the_same(train: Make) -> None:
    class Doubling(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    trainer = train(partial(callback_trainer, base=Doubling), {"episode_length": 1})
    assert trainer.aees.get_logs()["episode_start_losses"] == logged(trainer)
    assert logged(trainer)[0] > 7  # twice ln 64


def test_after_training_the_trainer_and_its_optimizer_are_as_before(train: Make) -> None:
    trainer = train(pulse=PULSE)
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
    assert "backward" not in vars(trainer.accelerator)
    assert "pulseopt_hf" not in vars(trainer.optimizer)["step"].__code__.co_filename


def test_an_exception_in_training_leaves_neither_a_scaled_lr_nor_hooks_behind(
    make_trainer: Make,
) -> None:
    arms = {"lr_candidates": [3.0], "episode_length": 4}
    trainer = make_trainer(pulse=arms, lr_scheduler_type="constant")
    calls = []

    def fail(optimizer: Any, *_: Any) -> None:
        calls.append(optimizer.param_groups[0]["lr"])
        if len(calls) == 6:
            raise KeyboardInterrupt

    trainer.create_optimizer()
    handle = trainer.optimizer.register_step_post_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    inner = trainer.optimizer.optimizer
    assert inner.param_groups[0]["lr"] == trainer.args.learning_rate
    assert not inner._optimizer_step_pre_hooks
    handle.remove()
    trainer.train()
    assert len(trainer.aees.get_logs()["episode_rewards"]) == 6
