"""Steps with a non-finite loss or gradient: skipped, counted, or an error."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from transformers import Trainer

from pulseopt_hf import PulseOptTrainer
from tests.conftest import Make, callback_trainer, logged, parameters_equal
from tests.engines.trainers import bad_loss

SETTINGS = {"lr_candidates": [0.5, 2.0], "episode_length": 4}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("only_loss", [False, True], ids=["gradients too", "loss only"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0], ids=["unclipped", "clipped"])
def test_a_step_that_is_not_finite_is_skipped_and_counts_nowhere(
    train: Make, bad: float, only_loss: bool, max_grad_norm: float
) -> None:
    cls = bad_loss(2, 3, 9, value=bad, only_loss=only_loss)
    trainer = train(cls, SETTINGS, max_grad_norm=max_grad_norm)
    aees = trainer.aees
    assert aees.skipped_steps == 3
    assert aees.optimizer_steps == 21
    logs = aees.get_logs()
    assert logs["episode_end_steps"] == [5, 10, 14, 18, 22, 23]
    assert all(math.isfinite(loss) for loss in logs["episode_end_losses"])
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    # The scheduler advanced 21 times of 24.
    assert trainer.lr_scheduler.last_epoch == 21
    assert logged(trainer, "pulse/skipped_steps")[1:5] == [0, 1, 2, 2]


def test_with_one_arm_skipped_steps_are_logged_once_there_are_some(train: Make) -> None:
    trainer = train(bad_loss(2, 9), {"calibration": "off"})
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    counts = [entry.get("pulse/skipped_steps") for entry in entries]
    assert counts == [None, None, *[1] * 7, *[2] * 15]
    assert "pulse/learning_rate" not in entries[-1]  # it would be `learning_rate`


def test_a_skipped_step_changes_no_parameter_and_no_moment(train: Make, tiny_model: Any) -> None:
    trainer = train(bad_loss(*range(24)), {**SETTINGS, "max_consecutive_skips": 100})
    assert trainer.aees.skipped_steps == 24
    assert parameters_equal(trainer.model, tiny_model())
    assert not trainer.optimizer.state
    assert trainer.aees.get_logs()["episode_rewards"] == []


def test_the_callback_skips_as_the_subclass_does(train: Make) -> None:
    subclass = train(bad_loss(3, 4, value=math.inf), SETTINGS)
    base = bad_loss(3, 4, value=math.inf, base=Trainer)
    attached = train(partial(callback_trainer, base=base), SETTINGS)
    assert attached.aees.skipped_steps == 2
    assert attached.aees.get_logs() == subclass.aees.get_logs()
    assert parameters_equal(attached.model, subclass.model)


def test_one_bad_micro_batch_skips_the_whole_step(train: Make) -> None:
    class OneBad(PulseOptTrainer):
        batches = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.batches += 1
            return loss * math.nan if self.batches == 2 else loss

    trainer = train(OneBad, SETTINGS, gradient_accumulation_steps=3, max_steps=8)
    assert trainer.aees.skipped_steps == 1
    assert trainer.aees.optimizer_steps == 7
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_raise_ends_the_run_at_the_step_before_the_update(make_trainer: Make) -> None:
    trainer = make_trainer(bad_loss(5), {**SETTINGS, "nonfinite": "raise"})
    with pytest.raises(ValueError, match="not finite at global step 5; the step's loss is nan"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
