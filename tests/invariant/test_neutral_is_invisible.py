"""With one arm that does nothing, PulseOptTrainer is Trainer, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import Trainer

from pulseopt_hf import PulseOptConfig
from tests.conftest import callback_trainer, history, parameters_equal

OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"]
NEUTRAL = PulseOptConfig(lr_candidates=[1.0], noise_candidates=[0.0])


def checkpoint_weights(trainer: Trainer) -> dict[str, Any]:
    return load_file(Path(trainer.args.output_dir) / "checkpoint-8" / "model.safetensors")


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_neutral_arms_are_invisible(train, tiny_model, optim, bf16, max_grad_norm, accumulation):
    settings = {
        "optim": optim,
        "bf16": bf16,
        "max_grad_norm": max_grad_norm,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 12,
        "save_steps": 8,
        "warmup_steps": 3,
    }
    vanilla = train(Trainer, **settings)
    pulse = train(pulse=NEUTRAL, **settings)
    assert parameters_equal(pulse.model, vanilla.model)
    assert history(pulse) == history(vanilla)
    ours, theirs = checkpoint_weights(pulse), checkpoint_weights(vanilla)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert not parameters_equal(pulse.model, tiny_model())  # it trained


def test_a_neutral_callback_is_invisible_too_and_an_arm_that_does_something_is_not(train):
    vanilla = train(Trainer)
    attached = train(callback_trainer, NEUTRAL)
    assert parameters_equal(attached.model, vanilla.model)
    assert history(attached) == history(vanilla)
    pulse = train(pulse={"lr_candidates": [1.5], "noise_candidates": [0.0]})
    assert not parameters_equal(pulse.model, vanilla.model)
