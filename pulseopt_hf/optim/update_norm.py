"""How far optimizer steps move the parameters, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pulseopt_hf.optim.scalars import norm

MAX_ELEMENTS = 1 << 22  # 16 MiB of float32


class UpdateNorm:
    """Measures the L2 norm of the parameters' change in each step.

    Up to `max_elements` parameters the norm is exact. Of a larger model every k-th element is
    watched, with the smallest k that fits, and the norm is the estimate from those.

    Args:
        parameters: the parameters that the optimizer changes.
        max_elements: most elements to keep a copy of.

    Raises:
        ValueError: a parameter is sharded; its change is spread over ranks.
    """

    def __init__(self, parameters: Iterable[Tensor], max_elements: int = MAX_ELEMENTS) -> None:
        self._parameters = list(parameters)
        if any(isinstance(parameter, DTensor) for parameter in self._parameters):
            raise ValueError(
                "`log_update_norm` needs whole parameters, and these are sharded over ranks. Set "
                "`log_update_norm` to False."
            )
        elements = sum(parameter.numel() for parameter in self._parameters)
        self._stride = max(1, -(-elements // max_elements))
        self._before: list[Tensor] = []
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember where the watched elements are."""
        self._before = [self._watched(parameter).clone() for parameter in self._parameters]

    @torch.no_grad()
    def after_step(self) -> None:
        """Measure how far they went. Reads nothing from the device."""
        squares = [
            norm(self._watched(parameter) - before).square().mul(parameter.numel() / before.numel())
            for parameter, before in zip(self._parameters, self._before, strict=True)
            if before.numel()
        ]
        self._before = []
        self._norms.append(torch.stack(squares).sum().sqrt())

    def mean(self) -> float | None:
        """Return the mean norm since the last call, or `None` without a step. One device read."""
        if not self._norms:
            return None
        mean = float(torch.stack(self._norms).mean())
        self._norms = []
        return mean

    def _watched(self, parameter: Tensor) -> Tensor:
        return parameter.detach().reshape(-1)[:: self._stride]
