"""How far optimizer steps move the parameters, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pulseopt_hf.optim.scalars import norm, stack

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
        self._norms: list[float | Tensor] = []

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
        """Return the mean norm since the last call, or `None` without a step. One device read.

        It is `None` as well where a step went so far that its norm is not finite.
        """
        norms, self._norms = stack(self._norms).tolist(), []
        mean = sum(norms) / len(norms) if norms else math.nan
        return mean if math.isfinite(mean) else None

    def state(self) -> list[float | None]:
        """Return the norms since the last `mean`, as JSON. One device read."""
        return [value if math.isfinite(value) else None for value in stack(self._norms).tolist()]

    def restore(self, state: Sequence[float | None]) -> None:
        """Go on from `state`."""
        self._norms = [math.nan if value is None else value for value in state]

    def _watched(self, parameter: Tensor) -> Tensor:
        return parameter.detach().reshape(-1)[:: self._stride]
