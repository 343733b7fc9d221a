"""Calibration on a GPU leaves nothing behind and finds what it finds on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pulseopt_hf import PulseOptConfig, PulseOptTrainer, find_learning_rate
from tests.conftest import without_dropout
from tests.engines.test_calibration import calibrated, check

pytestmark = pytest.mark.gpu

SHORT = {"max_steps": 60, "learning_rate": 1e-4}


def on_cpu(tiny_model: Any, tiny_data: Any, arguments: Any) -> dict[str, Any]:
    return calibrated(without_dropout(tiny_model()), arguments(**SHORT), tiny_data)


@pytest.mark.parametrize(
    "extra",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"optim": "adamw_torch"}],
    ids=["fp32", "bf16", "checkpointing", "not fused"],
)
def test_trials_leave_nothing_behind_and_find_the_cpus_lr(
    extra: dict[str, Any], tiny_model: Any, tiny_data: Any, arguments: Any, on_gpu: Any
) -> None:
    result = calibrated(without_dropout(tiny_model()), on_gpu(**SHORT, **extra), tiny_data)
    assert result["seen"][0].is_cuda
    check(result)
    reference = on_cpu(tiny_model, tiny_data, arguments)
    assert result["found"] == pytest.approx(reference["found"], rel=0.05)


def test_under_a_real_gradient_scaler(
    tiny_model: Any, tiny_data: Any, arguments: Any, on_gpu: Any
) -> None:
    settings = on_gpu(**SHORT, fp16=True, optim="adamw_torch_fused")
    result = calibrated(without_dropout(tiny_model()), settings, tiny_data)
    check(result, kept_gradient=False)
    # One trial for each gradient, so each trial has another batch than on the CPU.
    assert result["found"] == pytest.approx(
        on_cpu(tiny_model, tiny_data, arguments)["found"], rel=0.2
    )


@pytest.mark.parametrize("capturable", [False, True])
def test_find_learning_rate_leaves_nothing_behind(
    capturable: bool, tiny_model: Callable[[], Any], tiny_data: Any, on_gpu: Callable[..., Any]
) -> None:
    model = tiny_model().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=capturable)
    trainer = PulseOptTrainer(
        model,
        on_gpu(**SHORT),
        train_dataset=tiny_data,
        pulse=PulseOptConfig(calibration="trust_region"),
        optimizers=(optimizer, None),
    )
    before = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(3)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    found = find_learning_rate(trainer)
    assert all(map(torch.equal, before, model.parameters()))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert not optimizer.state
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-4)
    trainer.train()
    assert trainer.aees is not None
    assert trainer.aees.calibrator is not None
    assert trainer.aees.calibrator.search.learning_rate == found.learning_rate
