"""The step loss is what Trainer logs with `logging_steps=1`, whatever makes up the loss."""

from typing import Any

import pytest
import torch

from pulseopt_hf import PulseOptConfig
from tests.conftest import logged

PULSE = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=1)


def summed_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    # 18 batches an epoch, of which the last update gets two.
    "short last accumulation": {"gradient_accumulation_steps": 4, "max_steps": 12},
    "label smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "compute_loss_func": {"gradient_accumulation_steps": 2, "compute_loss_func": summed_loss},
    "bf16": {"bf16": True, "gradient_accumulation_steps": 2},
    "no token averaging": {"average_tokens_across_devices": False},
    "unclipped": {"max_grad_norm": 0.0},
    "evaluations in between": {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True},
}


@pytest.mark.parametrize("road", ["subclass", "attached"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_step_loss_is_what_trainer_logs(train, tiny_data, setting, road):
    # Rows of different lengths, so that averaging over tokens is not averaging over batches.
    data = [
        {**row, "labels": row["labels"].masked_fill(torch.arange(16) >= 5 + i % 11, -100)}
        for i, row in enumerate(tiny_data)
    ]
    settings = {"max_steps": 20, **SETTINGS[setting]}
    trainer = train(road, PULSE, train_dataset=data, **settings)
    trainer.evaluate()
    evaluations = sum("eval_loss" in entry for entry in trainer.state.log_history)
    assert evaluations == (9 if "eval_steps" in settings else 1)
    losses = logged(trainer)
    assert len(losses) == settings["max_steps"]
    assert trainer.aees.get_logs()["episode_start_losses"] == losses
    assert len(set(losses)) > 10
