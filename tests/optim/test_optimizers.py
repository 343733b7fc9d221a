"""The transient LR for every kind of optimizer, or one clear error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch import nn
from transformers.optimization import Adafactor

from pulseopt_hf import AEES
from tests.conftest import parameters_equal

STEPS = 12


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def groups(module: nn.Module, **second: Any) -> list[dict[str, Any]]:
    first, last = module[0], module[2]
    return [{"params": list(first.parameters())}, {"params": list(last.parameters()), **second}]


def run(module: nn.Module, optimizer: Any, aees: AEES | None = None) -> None:
    """Take steps; where there is an AEES, through it."""
    generator = torch.Generator().manual_seed(1)
    for number in range(STEPS):
        batch = torch.randn(16, 6, generator=generator)
        module.zero_grad()
        loss = (module(batch) - batch[:, :3]).pow(2).mean()
        loss.backward()
        if aees is not None:
            aees.step_start(number)
            aees.step_end(loss)
        else:
            optimizer.step()


def run_under_aees(optimizer: torch.optim.Optimizer, module: nn.Module, multiplier: float) -> None:
    run(module, optimizer, AEES(optimizer, lr_candidates=[multiplier]))


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    assert parameters_equal(one, other)
    assert not parameters_equal(one, model())  # they were trained


KINDS: dict[str, Callable[[Any, Any], torch.optim.Optimizer]] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "sgd fused": lambda p, lr: torch.optim.SGD(p, lr=lr, fused=True),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=False),
    "adamw foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    "adamw fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr),
    "nadam": lambda p, lr: torch.optim.NAdam(p, lr=lr),
    "torch adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
    "transformers adafactor": lambda p, lr: Adafactor(
        p, lr=lr, relative_step=False, scale_parameter=False
    ),
    "schedule-free adamw": lambda p, lr: AdamWScheduleFree(p, lr=lr, warmup_steps=3),
    "prodigy": lambda p, lr: Prodigy(p, lr=lr),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_multiplier_equals_the_optimizer_with_the_lr_multiplied(kind: str) -> None:
    under_aees, plain = model(), model()
    optimizer = KINDS[kind](under_aees.parameters(), 2.0**-7)
    reference = KINDS[kind](plain.parameters(), 2.0**-5)
    for each in (optimizer, reference):
        if hasattr(each, "train"):
            each.train()
    run_under_aees(optimizer, under_aees, 4.0)
    run(plain, reference)
    assert optimizer.param_groups[0]["lr"] == 2.0**-7
    assert_equal(under_aees, plain)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_groups_with_lrs_of_their_own_are_each_multiplied_and_restored(as_tensor: bool) -> None:
    def lr(value: float) -> Any:
        return torch.tensor(value) if as_tensor else value

    under_aees, plain = model(), model()
    optimizer = torch.optim.AdamW(groups(under_aees, lr=lr(0.002)), lr=lr(0.001), foreach=False)
    reference = torch.optim.AdamW(groups(plain, lr=lr(0.008)), lr=lr(0.004), foreach=False)
    run_under_aees(optimizer, under_aees, 4.0)
    run(plain, reference)
    restored = [float(group["lr"]) for group in optimizer.param_groups]
    assert restored == [float(lr(0.001)), float(lr(0.002))]
    for one, other in zip(under_aees.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_an_lr_tensor_stays_the_same_object_and_is_scaled_once_where_groups_share_it() -> None:
    module, shared = model(), torch.tensor(0.125)
    optimizer = torch.optim.SGD(groups(module), lr=0.5)
    for group in optimizer.param_groups:
        group["lr"] = shared
    seen: list[float] = []
    aees = AEES(optimizer, lr_candidates=[3.0])
    optimizer.register_step_pre_hook(lambda *_: seen.append(float(shared)))
    before = [parameter.detach().clone() for parameter in module.parameters()]
    aees.step_start(0)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    aees.step_end(1.0)
    assert seen == [0.375]
    assert all(group["lr"] is shared for group in optimizer.param_groups)
    assert float(shared) == 0.125
    for old, new in zip(before, module.parameters(), strict=True):
        torch.testing.assert_close(old - new, torch.full_like(old, 0.375))


def test_a_reduce_on_plateau_scheduler_beside_it_sees_the_base_lr() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    run_under_aees(optimizer, module, 2.0)
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_what_can_be_no_part_of_it_is_refused_with_what_to_write() -> None:
    own_lr = Adafactor(model().parameters(), relative_step=True)
    for optimizer, error, message in (
        (own_lr, ValueError, r"Adafactor\(..., lr=1e-3, relative_step=False\)"),
        (torch.optim.LBFGS(model().parameters()), ValueError, "LBFGS.step needs a closure"),
        (nn.Linear(1, 1), TypeError, "must be a torch.optim.Optimizer, got Linear"),
    ):
        with pytest.raises(error, match=message):
            AEES(optimizer)


def test_steps_outside_of_a_step_of_the_loop_stay_plain() -> None:
    under_aees, plain = model(), model()
    optimizer = torch.optim.SGD(under_aees.parameters(), lr=0.1)
    AEES(optimizer, lr_candidates=[5.0], noise_candidates=[1.0])
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    run(under_aees, optimizer)
    run(plain, reference)
    assert_equal(under_aees, plain)
