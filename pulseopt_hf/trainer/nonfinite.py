"""The non-finite guard: no update from a NaN or infinite loss or gradient, on any rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pulseopt_hf.trainer.patches import MethodPatches


class NonFiniteGuard:
    """Tells before each optimizer step whether its loss and gradients are finite.

    It reads the gradient norm. Trainer computes it anyway, and it is the same on all ranks, so all
    of them reach the same decision without communicating. A loss that is not finite is made to show
    there: its gradient is multiplied by `1 + 0 * loss`, which is NaN then and exactly 1 otherwise.
    One scalar is read from the device per step.

    Args:
        accelerator: the Trainer's, whose `backward` is looked into.
        patches: what undoes that after training.
    """

    def __init__(self, accelerator: Any, patches: MethodPatches) -> None:
        self._norm: float | Tensor | None = None
        patches.wrap(accelerator, "backward", self._show_in_gradient)

    def note(self, norm: float | Tensor) -> None:
        """Note the gradient norm that Trainer has computed for the step that comes."""
        self._norm = norm

    def is_finite(self) -> bool:
        """Whether the step's gradients, and with them its losses, are finite. One device read."""
        norm, self._norm = self._norm, None
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return norm is None or bool(torch.isfinite(torch.as_tensor(norm)).all())

    def _show_in_gradient(self, backward: Any) -> Any:
        def poisoned_backward(loss: Tensor, **kwargs: Any) -> None:
            backward(loss * (1 + 0 * loss.detach()), **kwargs)

        return poisoned_backward
