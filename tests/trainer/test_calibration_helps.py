"""A small cut of the benchmark: its direction, not its digits."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from pulseopt_hf import embedded
from tests.conftest import Make

STEPS, CONTEXT = 600, 48


@pytest.fixture(scope="module")
def characters() -> tuple[list[Any], list[Any]]:
    """Blocks of the embedded corpus, as bytes: training and validation."""
    parts = []
    for split in embedded.language_modelling().values():
        text = "\n".join(split["text"]).encode("ascii", "replace")
        blocks = torch.tensor(list(text[: len(text) // CONTEXT * CONTEXT])).view(-1, CONTEXT)
        parts.append([{"input_ids": block, "labels": block} for block in blocks])
    return parts[0], parts[1][:200]


def final_loss(characters: Any, train: Make, learning_rate: float, calibration: str) -> float:
    set_seed(0)
    shape = {"n_positions": CONTEXT, "n_embd": 48, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, **shape, **ends))
    trainer = train(
        pulse={"calibration": calibration},
        **{"model": model, "train_dataset": characters[0], "eval_dataset": characters[1]},
        **{"max_steps": STEPS, "learning_rate": learning_rate, "warmup_steps": 20},
        **{"per_device_train_batch_size": 16, "logging_strategy": "no"},
    )
    return float(trainer.evaluate()["eval_loss"])


def test_from_a_wrong_base_lr_most_of_what_tuning_gives(characters: Any, train: Make) -> None:
    """Tuned, a static run of this model wants about 3e-3."""
    tuned = final_loss(characters, train, 3e-3, "off")
    static = final_loss(characters, train, 1.5e-4, "off")
    assert static - tuned > 0.4
    for wrong in (1.5e-4, 1.5e-1):
        calibrated = final_loss(characters, train, wrong, "trust_region")
        assert calibrated - tuned < (static - tuned) / 3, (wrong, tuned, static, calibrated)
