"""The non-finite guard: no update from a NaN or infinite loss or gradient, on any rank.

It reads the gradient norm. Trainer computes it anyway, and it is the same on all ranks, so all of
them reach the same decision without communicating.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pulseopt_hf.trainer.patches import wrap


def show_losses_in_gradients(accelerator: Any, patches: ExitStack) -> None:
    """Make a loss that is not finite show in its gradients, until `patches` is closed.

    They are multiplied by `1 + 0 * loss`, which is NaN then and exactly 1 otherwise.
    """

    def poisoning(backward: Any) -> Any:
        return lambda loss, **kwargs: backward(loss * (1 + 0 * loss.detach()), **kwargs)

    wrap(patches, accelerator, "backward", poisoning)


def is_finite(norm: float | Tensor | None) -> bool:
    """Whether a step's gradients are, by their norm, if there is one. One device read."""
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm is None or bool(torch.isfinite(torch.as_tensor(norm)).all())
