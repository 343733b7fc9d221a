"""A Trainer that trains again begins at the learning rate that was set."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trainer.test_calibration import NAMED, calibrator_of


@pytest.mark.parametrize("road", ["subclass", "attached", "events"])
def test_a_second_training_is_calibrated_from_the_lr_that_was_set(
    trainer_of: Any, road: str
) -> None:
    trainer = trainer_of(NAMED, road, max_steps=60, learning_rate=1e-6)
    trainer.train()
    assert calibrator_of(trainer).outcome.learning_rate > 1e-5
    for _ in range(2):
        trainer.train()
        assert calibrator_of(trainer).search.trials
        assert calibrator_of(trainer).outcome.set_lr == pytest.approx(1e-6, rel=1e-12)


def test_an_lr_that_was_set_in_between_is_kept(trainer_of: Any) -> None:
    trainer = trainer_of(NAMED, max_steps=60, learning_rate=1e-6)
    trainer.train()
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 2e-5
    trainer.lr_scheduler = None
    trainer.train()
    assert calibrator_of(trainer).outcome.set_lr == pytest.approx(2e-5)
