"""How far an optimizer's later steps go. A trial can only take its first one."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from pulseopt_hf.optim import base_lr
from pulseopt_hf.optim.randomness import kept_random_state
from pulseopt_hf.optim.unwrap import device_of

logger = logging.getLogger("pulseopt_hf.calibration")

MOST_STEPS = 1000
SIZE = 8  # rows and columns of the matrix that stands for a kind of parameter group
LR = 1e-5  # so low that the matrix hardly changes
SMALLER, ALIKE = 10.0, 3.0  # a gradient so much smaller leaves ratios this much alike


def later_steps(optimizer: torch.optim.Optimizer, steps: int = MOST_STEPS) -> float | None:
    """Return the RMS length of an optimizer's steps along one gradient, in lengths of the first.

    AdamW's are all equally long. Those of RMSprop shrink to a tenth of the first, Adagrad's with
    the root of their number, and the average of a schedule-free optimizer follows at half the
    speed: they stand a higher LR than their first step tells. This is seen by stepping another
    optimizer of its class and settings, with a small matrix for each kind of parameter group.

    Steps that grow count as equally long: at the LR that suits SGD with momentum its first step is
    about as long as that of SGD without.

    Args:
        optimizer: the innermost optimizer, before its first step.
        steps: of the run, > 1.

    Returns:
        A number in (0, 1]; 1 for an optimizer that cannot be made anew from its settings. `None`
        where first steps are of another kind than later ones, as RAdam's are, which begin as SGD:
        then the ratio is another one for a smaller gradient.
    """
    steps = min(steps, MOST_STEPS)
    if type(optimizer).__module__.startswith("deepspeed."):
        return 1.0  # its Adam and Lion step evenly, and print when one is made
    try:
        with kept_random_state(device_of(optimizer)):
            ratio, smaller = (_walk(optimizer, steps, scale) for scale in (1.0, 1.0 / SMALLER))
    except Exception as error:  # a user's optimizer may need more than its settings
        logger.info("%s is taken to step evenly: %r", type(optimizer).__name__, error)
        return 1.0
    if not 1.0 / ALIKE < smaller / ratio < ALIKE:
        return None
    return min(1.0, ratio)


def _walk(optimizer: torch.optim.Optimizer, steps: int, scale: float) -> float:
    """Return the RMS length of so many steps, in lengths of the first, along a gradient."""
    generator = torch.Generator().manual_seed(0)
    matrices, gradients, groups = [], [], []
    kinds = {_settings(group): group for group in optimizer.param_groups}
    for group in kinds.values():
        value, gradient = torch.randn(2, SIZE, SIZE, generator=generator, dtype=torch.float64)
        matrices.append(nn.Parameter(value.to(device_of(optimizer))))
        gradients.append(scale * gradient.to(matrices[-1].device))
        lr = group["lr"]
        low = torch.full_like(lr, LR) if isinstance(lr, Tensor) else LR
        # A copy, since some optimizers count their steps in a tensor of the group.
        own = copy.deepcopy({key: value for key, value in group.items() if key != "params"})
        groups.append({**own, "params": [matrices[-1]], "lr": low})
    accepted = inspect.signature(type(optimizer)).parameters
    given = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    walker = type(optimizer)(groups, **given)
    if hasattr(walker, "train"):
        walker.train()  # schedule-free optimizers have two modes
    base_lr.skip_warmup(walker)
    squares = []
    for _ in range(steps):
        before = [matrix.detach().clone() for matrix in matrices]
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient.clone()  # some optimizers change it in place
        walker.step()
        moved = [matrix.detach() - old for matrix, old in zip(matrices, before, strict=True)]
        squares.append(torch.stack(moved).square().sum())
    ratio = torch.stack(squares).mean() / squares[0]  # not a number where the first does not move
    return math.sqrt(float(ratio))


def _settings(group: dict[str, Any]) -> str:
    """Return what a parameter group says beside its LR."""
    return repr({**group, "params": None, "lr": None, "initial_lr": None})
