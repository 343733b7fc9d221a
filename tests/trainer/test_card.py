"""The model card says what the method did, in valid metadata and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import Trainer

from pulseopt_hf import PulseOptCallback, PulseOptConfig, PulseOptTrainer
from pulseopt_hf.trainer.card import TAG


@pytest.mark.parametrize("road", ["subclass", "callback"])
def test_the_card_has_plays_knobs_and_the_range_of_the_lr(
    tiny_model: Any, tiny_data: Any, arguments: Any, road: str
) -> None:
    config = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=3, calibration="ladder")
    args = arguments(max_steps=160)
    if road == "subclass":
        trainer: Any = PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data, pulse=config)
    else:
        trainer = Trainer(tiny_model(), args, train_dataset=tiny_data)
        PulseOptCallback(config).attach(trainer)
    trainer.train()
    for _ in range(2):  # written again, it is there once
        trainer.create_model_card(model_name="tiny", tags=["mine"])
    card = ModelCard.load(Path(args.output_dir) / "README.md")
    assert set(card.data.tags) >= {TAG, "mine"}
    assert card.text.count("## Learning rate") == 1
    logs = trainer.aees.get_logs()
    for value in (0.5, 2.0):
        assert f"| x{value:g} | 0 | {logs['selected_lr_values'].count(value)} |" in card.text
    used = [e["pulse/learning_rate"] for e in trainer.state.log_history if "loss" in e]
    assert f"logged: {min(used):.3g} to {max(used):.3g}." in card.text
    assert f"Calibrated: {trainer.aees.calibration.scale:.3g} times" in card.text
    assert "| `lr_candidates` | `[0.5, 2.0]` |" in card.text
    assert "| `nonfinite` |" not in card.text


def test_a_trainer_that_has_not_trained_writes_a_plain_card(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    args = arguments()
    trainer = PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data)
    trainer.create_model_card()
    file = Path(args.output_dir) / "README.md"
    assert not file.exists() or "## Learning rate" not in file.read_text()
