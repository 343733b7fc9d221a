"""The non-finite guard: no update from a NaN or infinite loss or gradient, on any rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pulseopt_hf.trainer.patches import MethodPatches


class NonFiniteGuard:
    """Tells before each optimizer step whether its loss and gradients are finite.

    What it reads is the gradient norm, which Trainer computes anyway and which is the same on all
    ranks, so they decide alike without a word between them. A loss that is not finite is made to
    show there: its gradient is multiplied by `1 + 0 * loss`, which is NaN then and exactly 1
    otherwise. One scalar is read from the device per step.

    Args:
        accelerator: the Trainer's, whose `backward` and `clip_grad_norm_` are looked into.
        patches: what undoes that after training.
        parameters: the model's, for a release of Transformers that computes no norm where it does
            not clip (before 5.18).
    """

    def __init__(
        self, accelerator: Any, patches: MethodPatches, parameters: Iterable[Tensor]
    ) -> None:
        """See the class."""
        self._parameters = list(parameters)
        self._norm: float | Tensor | None = None
        patches.wrap(accelerator, "backward", self._show_in_gradient)
        patches.wrap(accelerator, "clip_grad_norm_", self._keep_norm)

    def is_finite(self) -> bool:
        """Whether the step's gradients, and with them its losses, are finite. One device read."""
        norm, self._norm = self._norm, None
        if norm is None:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return bool(torch.isfinite(torch.as_tensor(norm)).all())

    def _show_in_gradient(self, backward: Any) -> Any:
        def poisoned_backward(loss: Tensor, **kwargs: Any) -> None:
            backward(loss * (1 + 0 * loss.detach()), **kwargs)

        return poisoned_backward

    def _keep_norm(self, clip_grad_norm: Any) -> Any:
        def kept_norm(*args: Any, **kwargs: Any) -> Any:
            self._norm = clip_grad_norm(*args, **kwargs)
            return self._norm

        return kept_norm
