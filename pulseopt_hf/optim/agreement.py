"""What ranks tell each other: a few bytes an episode, so that all of them run the same arms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pulseopt_hf.optim.scalars import stack


class Agreement:
    """Collectives over the default process group, or none at all in a single process.

    Args:
        device: device of the parameters. A backend that cannot send from it uses the accelerator.
        enabled: `False` keeps ranks to themselves.
    """

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self._enabled = enabled
        self._parameter_device = device

    @property
    def world_size(self) -> int:
        """Number of ranks that agree."""
        if not (self._enabled and dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size()

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank speaks for all."""
        return self.world_size == 1 or dist.get_rank() == 0

    def mean(self, values: Sequence[float | Tensor]) -> list[float]:
        """Average scalars over ranks, in the precision that they come in. One device read.

        Args:
            values: scalars of shape (), equally many on every rank.
        """
        joined = stack(values)
        if self.world_size > 1:
            joined = joined.to(self._device())
            dist.all_reduce(joined)
            joined /= self.world_size
        result: list[float] = joined.tolist()
        return result

    def from_rank_0(self, values: Sequence[int]) -> list[int]:
        """Return rank 0's whole numbers, each below 2^63, on every rank."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self._device())
        dist.broadcast(tensor, src=0)
        result: list[int] = tensor.tolist()
        return result

    def any(self, value: bool) -> bool:
        """Return whether `value` is true on any rank."""
        return self.least(-int(value)) < 0

    def least(self, value: int) -> int:
        """Return the smallest `value` of all ranks."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self._device())
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor.item())

    def _device(self) -> torch.device:
        if self._parameter_device.type == "cpu" and dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return self._parameter_device
