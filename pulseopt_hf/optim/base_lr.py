"""The base LR: what an optimizer's groups and its schedulers say it is, read and multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pulseopt_hf.optim.unwrap import innermost

# Learning rates that torch's, Transformers' and DeepSpeed's schedulers keep: in a group...
_GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr")
# ...and as attributes. Without the lowest ones, a schedule would lose its shape, and without the
# last one a log would show the LR from before until the schedule's next step.
_ATTRIBUTES = (
    *("base_lrs", "min_lrs", "max_lrs", "delta_lrs", "_init_lrs", "_last_lr"),
    *("eta_min", "min_lr", "max_lr", "default_min_lr"),
)
# What the groups of optimizers hold that find their own LR: D-Adaptation's and Prodigy's an
# estimate of the distance, Adafactor's a flag.
_OWN_ESTIMATES = ("d", "relative_step")


def peaks(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the highest base LR of the schedule, for each parameter group."""
    groups = innermost(optimizer).param_groups
    return [float(group.get("initial_lr", group["lr"])) for group in groups]


def share_of_peak(optimizer: torch.optim.Optimizer) -> float:
    """Return the base LR as a share of its peak, in the group where that is highest.

    Reads the device where the LR is a tensor.
    """
    groups = innermost(optimizer).param_groups
    shares = [
        float(group["lr"]) / peak
        for group, peak in zip(groups, peaks(optimizer), strict=True)
        if peak > 0.0
    ]
    return max(shares, default=1.0)


def finds_its_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer finds its own LR, so that the one in its groups is a factor on that."""
    groups = innermost(optimizer).param_groups
    return any(group.get(key) for group in groups for key in _OWN_ESTIMATES)


def skip_warmup(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer that warms up by itself, as the schedule-free ones do, step at its full LR.

    For a trial, after which a snapshot puts the groups back.
    """
    for group in innermost(optimizer).param_groups:
        if "warmup_steps" in group:
            group["warmup_steps"] = 0


def multiply(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply the base LR, in every group and scheduler, so that the schedule keeps its shape.

    Args:
        optimizer: the optimizer, wrapped or not.
        scheduler: the scheduler, wrapped or nested, of any class, or `None`.
        factor: what to multiply by, > 0.
    """
    done: list[Tensor] = []  # groups may share one

    def times(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(times(item) for item in value)
        if not isinstance(value, Tensor):
            return value if value is None else value * factor
        if not any(value is other for other in done):
            done.append(value.mul_(factor))  # in place: a compiled optimizer holds on to it
        return value

    for group in innermost(optimizer).param_groups:
        group.update({key: times(group[key]) for key in _GROUP_KEYS if key in group})
    for one in _nested(scheduler):
        vars(one).update(
            {name: times(vars(one)[name]) for name in _ATTRIBUTES if name in vars(one)}
        )


def _nested(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler and those within it, each once: wrappers, sequences and chains."""
    waiting: list[Any] = [scheduler]
    seen: list[Any] = []
    while waiting:
        one = waiting.pop()
        if one is None or any(one is other for other in seen) or not hasattr(one, "__dict__"):
            continue
        seen.append(one)
        yield one
        waiting.append(vars(one).get("scheduler"))
        waiting.extend(vars(one).get("_schedulers", ()))
