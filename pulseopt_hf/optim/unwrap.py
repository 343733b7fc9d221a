"""Finding optimizers and parameters inside what a training stack wraps round them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def innermost(optimizer: Any) -> Any:
    """Return the optimizer whose step hooks fire when the parameters are updated.

    Accelerate's wrapper is an `Optimizer` by inheritance only: it has no step hooks of its own.
    """
    if is_accelerated(optimizer) or is_deepspeed(optimizer):
        return innermost(optimizer.optimizer)
    return optimizer


def stepped_parameters(optimizer: Any) -> list[torch.Tensor]:
    """Return the tensors that an optimizer steps.

    DeepSpeed's ZeRO-3 puts the parts that it steps into the groups only while it does. DeepSpeed
    0.18 - 0.19; `tests/engines/test_calibration.py` fails when that changes.
    """
    wrapped = optimizer.optimizer if is_accelerated(optimizer) else optimizer
    if is_deepspeed(wrapped) and hasattr(wrapped, "fp32_partitioned_groups_flat"):
        return list(wrapped.fp32_partitioned_groups_flat)
    return list(all_parameters(innermost(optimizer)))


def all_parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield every parameter of an optimizer, group by group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def zero_3_part(parameter: Any) -> torch.Tensor | None:
    """Return this rank's part of a parameter, shape (n,), or `None` where it has none.

    DeepSpeed's ZeRO-3 pads the last rank's part with memory that it leaves as it was. DeepSpeed
    0.18 - 0.19; `tests/engines/test_calibration.py` fails when that changes.
    """
    part: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    if part is None:
        return None
    start = part.numel() * dist.get_rank(parameter.ds_process_group)
    return part[: max(0, parameter.ds_numel - start)]


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a whole parameter, of which DeepSpeed's ZeRO-3 keeps no whole."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_deepspeed(optimizer: object) -> bool:
    """Whether this is one of DeepSpeed's optimizers, which hold the one that updates their parts.

    They are no torch optimizers themselves.
    """
    deepspeed = sys.modules.get("deepspeed.runtime.base_optimizer")
    return deepspeed is not None and isinstance(optimizer, deepspeed.DeepSpeedOptimizer)


def is_stepped_by_deepspeed(optimizer: Any) -> bool:
    """Whether this is Accelerate's wrapper whose `step` does nothing: the engine steps."""
    wrappers = sys.modules.get("accelerate.utils.deepspeed")
    return wrappers is not None and isinstance(optimizer, wrappers.DeepSpeedOptimizerWrapper)


def is_accelerated(optimizer: object) -> bool:
    """Whether this is Accelerate's wrapper; false where Accelerate was never imported."""
    accelerate = sys.modules.get("accelerate.optimizer")
    return accelerate is not None and isinstance(optimizer, accelerate.AcceleratedOptimizer)


def accumulates(optimizer: Any) -> bool:
    """Whether Accelerate holds back this step because more micro-batches are to come."""
    return is_accelerated(optimizer) and not optimizer.gradient_state.sync_gradients


def has_scaler(optimizer: Any) -> bool:
    """Whether Accelerate steps this optimizer through a gradient scaler."""
    return is_accelerated(optimizer) and optimizer.scaler is not None


def device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    """Return the device of the first parameter."""
    first = next(all_parameters(optimizer), None)
    return torch.device("cpu") if first is None else first.device
