"""PEFT LoRA: what is not trained is not copied. That it gets no noise, tests/optim shows."""

from typing import Any

import pytest
import torch

from pulseopt_hf.aees.calibration import WEIGHT_RADIUS
from tests.conftest import NAMED, TRIAL_STEPS, Make
from tests.engines.trainers import Watch


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="install the extra `peft` to run this")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


def test_with_an_adapter_only_what_is_trained_is_copied(tiny_model, make_trainer):
    model = lora(tiny_model())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 0.1 * sum(p.numel() for p in model.parameters())
    trainer = make_trainer(pulse=NAMED, model=model, max_steps=60, learning_rate=1e-6)
    watch = Watch(trainer, lambda trainer: trainer.aees.calibrator._origin.nbytes)
    trainer.train()
    _, *copied = watch.seen  # after each step
    assert trainer.aees.calibrator.search.learning_rate is not None
    # One copy of the trained parameters, in float32; none when the net is gone.
    assert set(copied[: TRIAL_STEPS + 10]) == {4 * trained}
    assert copied[-1] == 0


def test_a_step_of_lora_may_move_either_factor_by_a_share_of_the_one_that_is_not_zero(
    tiny_model: Any, make_trainer: Make
) -> None:
    model = lora(tiny_model())
    factors = [p.detach() for name, p in model.named_parameters() if "lora_A" in name]
    size = torch.cat([factor.flatten() for factor in factors]).square().mean().sqrt().item()
    found = make_trainer(pulse=NAMED, model=model, max_steps=60).find_learning_rate()
    assert found.limited_by == "weights"
    # The first step of AdamW moves each element of the other factor by the LR.
    assert found.learning_rate == pytest.approx(WEIGHT_RADIUS * size, rel=0.05)
