"""The base LR is multiplied wherever it is kept, so that every schedule keeps its shape."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from transformers import get_scheduler
from transformers.optimization import GreedyLR

from pulseopt_hf.optim.base_lr import multiply, peaks, share_of_peak

FACTOR, STEPS = 8.0, 12  # a power of two, so that products are exact


def make(lr: Any = 0.125, groups: int = 2) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(groups)]
    return torch.optim.AdamW(
        [{"params": [p], "lr": lr * 2.0**-i} for i, p in enumerate(parameters)]
    )


def sequence(optimizer: Any) -> Any:
    rise = schedulers.LinearLR(optimizer, 0.25, total_iters=3)
    fall = schedulers.CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=2.0**-10)
    return schedulers.SequentialLR(optimizer, [rise, fall], [3])


def chain(optimizer: Any) -> Any:
    return schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(optimizer, 0.5), schedulers.StepLR(optimizer, 3, 0.5)]
    )


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "linear": lambda o: get_scheduler("linear", o, 3, STEPS),
    "cosine": lambda o: get_scheduler("cosine", o, 0, STEPS),
    "cosine_with_min_lr": lambda o: get_scheduler(
        "cosine_with_min_lr", o, 0, STEPS, scheduler_specific_kwargs={"min_lr_rate": 0.125}
    ),
    "constant": lambda o: get_scheduler("constant", o, 0, STEPS),
    "sequence": sequence,
    "chain": chain,
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.125, total_steps=STEPS + 1),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.125, 0.5, step_size_up=3, cycle_momentum=False),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4, eta_min=2.0**-9),
}


def course(name: str, factor: float, at: int) -> list[list[float]]:
    """Return the LRs of each step, multiplied in step `at`."""
    optimizer = make()
    scheduler = SCHEDULES[name](optimizer)
    lrs = []
    for step in range(STEPS):
        if step == at:
            multiply(optimizer, scheduler, factor)
            assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        lrs.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return lrs


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("at", [0, 5])
def test_a_schedule_keeps_its_shape(name: str, at: int) -> None:
    plain, multiplied = course(name, 1.0, at), course(name, FACTOR, at)
    assert len({tuple(lrs) for lrs in plain}) > 3 or name == "constant"
    for step, (before, after) in enumerate(zip(plain, multiplied, strict=True)):
        factor = FACTOR if step >= at else 1.0
        assert after == pytest.approx([lr * factor for lr in before], rel=1e-9)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (schedulers.ReduceLROnPlateau, [2.0**-10, 2.0**-11, 2.0**-11, 2.0**-11]),
        (GreedyLR, [2.0**-9, 2.0**-10, 2.0**-11, 2.0**-11]),  # it rises after a good evaluation
    ],
)
def test_schedulers_that_keep_no_base_lr_go_on_from_the_new_one(cls, expected):
    """Their lowest LR may be far above what was found."""
    optimizer = make(groups=1)
    scheduler = cls(optimizer, patience=0, factor=0.5, min_lr=0.0625)
    multiply(optimizer, scheduler, 2.0**-7)
    lrs = []
    for _ in expected:
        scheduler.step(1.0)
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs == expected


def test_tensors_are_multiplied_in_place_and_once_where_groups_share_one() -> None:
    lr = torch.tensor(0.125)
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [p], "lr": lr} for p in parameters])
    for group in optimizer.param_groups:
        group["lr"] = lr
    scheduler = get_scheduler("linear", optimizer, 0, STEPS)
    multiply(optimizer, scheduler, FACTOR)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 1.0
    assert peaks(optimizer) == [1.0, 1.0]


def test_peaks_are_those_of_the_schedule_not_of_its_warm_up() -> None:
    optimizer = make()
    assert peaks(optimizer) == [0.125, 0.0625]
    get_scheduler("linear", optimizer, 3, STEPS)
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert peaks(optimizer) == [0.125, 0.0625]


def test_the_base_lr_is_a_share_of_its_peak() -> None:
    optimizer = make()
    assert share_of_peak(optimizer) == 1.0
    scheduler = get_scheduler("linear", optimizer, 3, STEPS)
    shares = []
    for _ in range(STEPS):
        shares.append(share_of_peak(optimizer))
        optimizer.step()
        scheduler.step()
    assert shares[:4] == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    assert shares[-1] == pytest.approx(1 / 9)
    assert share_of_peak(make(0.0)) == 1.0
