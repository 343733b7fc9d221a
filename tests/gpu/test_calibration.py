"""Calibration on a GPU leaves nothing behind and finds what it finds on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pulseopt_hf import find_learning_rate
from tests.conftest import NAMED, SHORT, Make, without_dropout
from tests.engines.test_calibration import calibrated, check

pytestmark = pytest.mark.gpu


@pytest.fixture
def both(make_trainer: Make, tiny_model: Any, arguments: Any, on_gpu: Make) -> Callable[..., Any]:
    """Return what calibrates on the GPU and on the CPU, on which extra settings have no say."""

    def run(**extra: Any) -> list[dict[str, Any]]:
        return [
            calibrated(make_trainer(pulse=NAMED, model=without_dropout(tiny_model()), args=args))
            for args in (on_gpu(**SHORT, **extra), arguments(**SHORT))
        ]

    return run


@pytest.mark.parametrize(
    "extra",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"optim": "adamw_torch"}],
    ids=["fp32", "bf16", "checkpointing", "not fused"],
)
def test_trials_leave_nothing_behind_and_find_the_cpus_lr(extra: dict[str, Any], both: Any) -> None:
    result, reference = both(**extra)
    assert result["seen"][0].is_cuda
    check(result)
    assert result["found"] == pytest.approx(reference["found"], rel=0.05)


def test_under_a_real_gradient_scaler(both: Any) -> None:
    result, reference = both(fp16=True, optim="adamw_torch_fused")
    check(result, kept_gradient=False)
    # One trial for each gradient, so each trial has another batch than on the CPU.
    assert result["found"] == pytest.approx(reference["found"], rel=0.2)


@pytest.mark.parametrize("capturable", [False, True])
def test_find_learning_rate_leaves_nothing_behind(capturable, make_trainer, tiny_model, on_gpu):
    model = tiny_model().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=capturable)
    trainer = make_trainer(
        pulse=NAMED, model=model, args=on_gpu(**SHORT), optimizers=(optimizer, None)
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
    assert trainer.aees.calibrator.search.learning_rate == found.learning_rate
