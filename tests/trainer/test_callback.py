"""Attaching the callback, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer

from pulseopt_hf import PulseOptCallback, PulseOptConfig, PulseOptTrainer
from tests.conftest import history, parameters_equal

PULSE = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=4)


def test_a_callback_with_arms_that_was_never_attached_raises_at_the_start_and_says_how(
    trainer_of: Any,
) -> None:
    callback = PulseOptCallback(PULSE)
    trainer = trainer_of(road="stock", callbacks=[callback])
    with pytest.raises(RuntimeError, match=r"PulseOptCallback\(config\).attach\(trainer\)"):
        trainer.train()


def test_a_callback_class_in_the_list_calibrates(trainer_of: Any) -> None:
    trainer = trainer_of(
        road="stock", max_steps=60, learning_rate=1e-4, callbacks=[PulseOptCallback]
    )
    trainer.train()
    assert trainer.lr_scheduler is not None
    assert trainer.lr_scheduler.base_lrs[0] > 1e-3
    assert "pulseopt_hf" not in vars(trainer.optimizer)["step"].__code__.co_filename


def test_a_callback_in_the_list_and_attached_is_there_once(trainer_of: Any) -> None:
    callback = PulseOptCallback(PULSE)
    trainer = trainer_of(road="stock", callbacks=[callback])
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    assert callback.aees is trainer.aees
    assert len(trainer.aees.get_logs()["episode_rewards"]) == 6


def test_attaching_twice_or_to_a_trainer_that_has_aees_is_refused(
    trainer_of: Any, tiny_model: Any, arguments: Any
) -> None:
    trainer = trainer_of(road="stock")
    PulseOptCallback(PULSE).attach(trainer)
    with pytest.raises(RuntimeError, match="has AEES already"):
        PulseOptCallback(PULSE).attach(trainer)
    with pytest.raises(RuntimeError, match="PulseOptTrainer has AEES already"):
        PulseOptCallback(PULSE).attach(PulseOptTrainer(tiny_model(), arguments()))
    with pytest.raises(TypeError, match="must be a Trainer"):
        PulseOptCallback(PULSE).attach(tiny_model())


def test_a_trainer_whose_training_step_went_another_way_is_refused_naming_the_subclass(
    trainer_of: Any,
) -> None:
    trainer = trainer_of(road="stock")
    PulseOptCallback(PULSE).attach(trainer)
    trainer.training_step = lambda *args, **kwargs: Trainer.training_step(trainer, *args, **kwargs)
    with pytest.raises(RuntimeError, match="stands in the place of the `training_step`"):
        trainer.train()


@pytest.mark.parametrize("calibration", ["auto", "off"])
def test_without_arms_a_training_step_that_is_not_seen_trains_as_the_stock_trainer(
    trainer_of: Any, calibration: str, arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def train(trainer: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            return Trainer.training_step(trainer, *args, **kwargs)

        trainer.training_step = step
        trainer.train()
        return trainer

    args = arguments(max_steps=60)
    stock = train(trainer_of(road="stock", args=args))
    pulse = PulseOptConfig(calibration=calibration)
    ours = trainer_of(pulse, args=args)
    train(ours)
    assert parameters_equal(ours.model, stock.model)
    entries = [
        {key: value for key, value in entry.items() if not key.startswith("pulse/")}
        for entry in history(ours)
    ]
    assert entries == history(stock)
    said = "the loss of `training_step` was not seen" in caplog.text
    assert said == (calibration == "auto")


def test_a_trainer_that_overrides_its_steps_is_seen_all_the_same(trainer_of: Any) -> None:
    class Doubling(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    trainer = trainer_of(cls=Doubling)
    PulseOptCallback(PulseOptConfig(episode_length=1)).attach(trainer)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.aees.get_logs()["episode_start_losses"] == logged
    assert logged[0] > 7  # twice ln 64


def test_after_training_the_trainer_and_its_optimizer_are_as_before(trainer_of: Any) -> None:
    trainer = trainer_of(PULSE)
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
    assert "backward" not in vars(trainer.accelerator)
    assert "pulseopt_hf" not in vars(trainer.optimizer)["step"].__code__.co_filename


def test_an_exception_in_training_leaves_neither_a_scaled_lr_nor_hooks_behind(
    trainer_of: Any,
) -> None:
    trainer = trainer_of(
        PulseOptConfig(lr_candidates=[3.0], episode_length=4), lr_scheduler_type="constant"
    )
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
