"""Optimizers whose first step, which is all that a trial can take, is not as long as later ones."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree, RAdamScheduleFree
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.optimization import Adafactor

from pulseopt_hf import PulseOptConfig, find_learning_rate
from pulseopt_hf.optim.calibrator import why_not_calibrate
from pulseopt_hf.optim.later_steps import later_steps

Make = Callable[[Any], torch.optim.Optimizer]
STEPS = 300
EVEN: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw with a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    "adafactor": lambda p: Adafactor(p, lr=1e-3, relative_step=False),
    "sgd": torch.optim.SGD,
    "sgd with momentum": lambda p: torch.optim.SGD(p, momentum=0.9),
}
# The root mean square of 300 steps, by the rule of each.
UNEVEN: dict[str, tuple[Make, float]] = {
    # lr g / sqrt((1 - 0.99^t) g^2), against ten times lr at t = 1
    "rmsprop": (
        torch.optim.RMSprop,
        math.sqrt(sum(1.0 / (1.0 - 0.99**t) for t in range(1, STEPS + 1)) / STEPS) / 10.0,
    ),
    # lr g / sqrt(t g^2)
    "adagrad": (
        torch.optim.Adagrad,
        math.sqrt(sum(1.0 / t for t in range(1, STEPS + 1)) / STEPS),
    ),
    # the weights in training lie at 0.1 z + 0.9 x, and x, the mean of all z, moves half as fast
    "schedule-free": (lambda p: AdamWScheduleFree(p, warmup_steps=30), 0.1 + 0.9 * 0.5),
}


@pytest.mark.parametrize("kind", EVEN)
def test_steps_are_even(kind: str) -> None:
    assert later_steps(EVEN[kind](nn.Linear(4, 3).parameters()), STEPS) == pytest.approx(
        1, abs=1e-3
    )


@pytest.mark.parametrize("kind", UNEVEN)
def test_later_steps_are_shorter(kind: str) -> None:
    make, expected = UNEVEN[kind]
    assert later_steps(make(nn.Linear(4, 3).parameters()), STEPS) == pytest.approx(expected, 0.01)


def test_hundreds_of_groups_cost_as_little_as_one() -> None:
    made = 0

    class Counting(torch.optim.RMSprop):
        def step(self, closure: Any = None) -> Any:
            nonlocal made
            made = max(made, len(self.param_groups))
            return super().step(closure)

    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1 / n} for n in range(1, 300)]
    ratio = later_steps(Counting([*groups, {"params": [], "alpha": 0.9}]), STEPS)
    assert made == 2
    assert ratio is not None
    assert ratio > UNEVEN["rmsprop"][1]  # the second kind forgets sooner


def test_an_optimizer_that_needs_more_than_its_settings_is_taken_to_step_evenly() -> None:
    class Named(torch.optim.SGD):
        def __init__(self, parameters: Any, name: str) -> None:
            super().__init__(parameters, lr=0.1)
            self.name = name

    assert later_steps(Named(nn.Linear(4, 3).parameters(), "mine")) == 1.0


def test_what_an_optimizer_counts_in_its_groups_stays_its_own() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group.setdefault("steps", torch.tensor(0)).add_(1)
            return super().step(closure)

    optimizer = Counting(nn.Linear(4, 3).parameters(), lr=0.1)
    optimizer.step()
    assert later_steps(optimizer, STEPS) == pytest.approx(1.0)
    assert optimizer.param_groups[0]["steps"] == 1


@pytest.mark.parametrize("make", [torch.optim.RAdam, RAdamScheduleFree])
def test_first_steps_of_another_kind_are_not_calibrated(make: Make) -> None:
    optimizer = make(nn.Linear(4, 3).parameters())
    assert later_steps(optimizer) is None
    reason = why_not_calibrate(optimizer, PulseOptConfig(calibration="trust_region"))
    assert reason == f"the first steps of {make.__name__} are not like later ones"


def test_the_lr_found_makes_up_for_shorter_steps() -> None:
    def found(make: Make) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        rows = torch.randn(64, 16, 8)
        suggestion = find_learning_rate(
            model=model,
            optimizer=make(model.parameters()),
            batches=list(rows),
            loss=lambda model, batch: cross_entropy(model(batch), batch[:, :4].argmax(1)),
        )
        assert suggestion.trials
        return suggestion.learning_rate

    adamw = found(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0))
    # First steps ten times as long as AdamW's, and later ones as long.
    rmsprop = found(lambda p: torch.optim.RMSprop(p, lr=1e-3))
    assert rmsprop == pytest.approx(adamw / 10.0 / 0.1237, rel=0.05)
