"""The step loss is what Trainer logs with `logging_steps=1`, whatever makes up the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer

from pulseopt_hf import PulseOptCallback, PulseOptConfig, PulseOptTrainer
from tests.conftest import history

PULSE = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=1)


def summed_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 3}, {}),
    # 18 batches an epoch, of which the last update gets two.
    "short last accumulation": ({"gradient_accumulation_steps": 4, "max_steps": 12}, {}),
    "label smoothing": (
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
        {},
    ),
    "compute_loss_func": (
        {"gradient_accumulation_steps": 2},
        {"compute_loss_func": summed_loss},
    ),
    "bf16": ({"bf16": True, "gradient_accumulation_steps": 2}, {}),
    "no token averaging": ({"average_tokens_across_devices": False}, {}),
    "unclipped": ({"max_grad_norm": 0.0}, {}),
}


@pytest.mark.parametrize("road", ["subclass", "callback"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_step_loss_is_what_trainer_logs(
    tiny_model: Any, tiny_data: Any, arguments: Any, setting: str, road: str
) -> None:
    overrides, init = SETTINGS[setting]
    # Rows of different lengths, so that averaging over tokens is not averaging over batches.
    data = [
        {**row, "labels": row["labels"].masked_fill(torch.arange(16) >= 5 + i % 11, -100)}
        for i, row in enumerate(tiny_data)
    ]
    args = arguments(**{"max_steps": 20, **overrides})
    if road == "subclass":
        trainer: Any = PulseOptTrainer(tiny_model(), args, train_dataset=data, pulse=PULSE, **init)
    else:
        trainer = Trainer(tiny_model(), args, train_dataset=data, **init)
        PulseOptCallback(PULSE).attach(trainer)
    trainer.train()
    logged = [entry["loss"] for entry in history(trainer) if "loss" in entry]
    assert len(logged) == args.max_steps
    assert trainer.aees.get_logs()["episode_start_losses"] == logged
    assert len(set(logged)) > 10


def test_an_evaluation_in_between_adds_nothing_to_the_step_loss(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    trainer = PulseOptTrainer(
        tiny_model(),
        arguments(eval_strategy="steps", eval_steps=3, eval_on_start=True),
        train_dataset=tiny_data,
        eval_dataset=tiny_data[:8],
        pulse=PULSE,
    )
    trainer.train()
    trainer.evaluate()
    entries = history(trainer)
    assert sum("eval_loss" in entry for entry in entries) == 10
    logged = [entry["loss"] for entry in entries if "loss" in entry]
    assert trainer.aees.get_logs()["episode_start_losses"] == logged
