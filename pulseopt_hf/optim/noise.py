"""Gradient noise that needs no state and no copy of the model.

The noise of one gradient is a function of (seed, optimizer step, parameter index, shard): the same
on every replica, different on every shard, and the same again after a resume, because there is no
generator whose state would have to be kept. Nothing here reads the device or touches the global
generators.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Elements drawn at a time. On a CPU a chunk has to stay in the cache; on an accelerator it has to
# be worth a kernel launch. The values drawn depend on it, so it is part of the function.
CPU_CHUNK = 1 << 14
ACCELERATOR_CHUNK = 1 << 22  # 16 MiB of float32

_MASK = (1 << 64) - 1


class GradientNoise:
    """Adds Gaussian noise to gradients in place.

    Args:
        seed: non-negative seed of all the noise of a run.
        mode: `absolute`: a level is the standard deviation per element, in the unit of the
            gradient. `relative`: it is a multiple of the gradient's root mean square, taken over
            the local shard of a sharded gradient.
    """

    def __init__(self, seed: int, mode: Literal["absolute", "relative"]) -> None:
        """See the class."""
        self.seed = seed
        self.mode = mode
        self._workspaces: dict[torch.device, tuple[torch.Generator, Tensor]] = {}

    @torch.no_grad()
    def add(
        self,
        parameters: Iterable[Tensor],
        level: float,
        step: int,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Add the noise of one optimizer step to every gradient that there is.

        Args:
            parameters: all parameters of the optimizer, in its order; the position of one is its
                index. Those without a gradient are passed over.
            level: noise level, > 0.
            step: number of optimizer steps taken before this one.
            grad_scale: factor that the gradients still carry from loss scaling, shape (), or
                `None`. The noise is scaled alike.
        """
        for index, parameter in enumerate(parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            shard = 0
            if isinstance(gradient, DTensor):
                shard, gradient = _shard_of(gradient), gradient.to_local()
            if gradient.is_sparse:
                # Rows that got no gradient get no noise. Duplicates are summed first, or the noise
                # of a row would grow with how often it was looked up.
                parameter.grad = gradient.coalesce()
                gradient = parameter.grad._values()
            flat = _flat_view(gradient)
            if flat.numel() == 0:
                continue
            scale = grad_scale if self.mode == "absolute" else None
            self._add_to(flat, level, _mix(self.seed, step, index, shard), scale)

    def _add_to(self, flat: Tensor, level: float, seed: int, grad_scale: Tensor | None) -> None:
        generator, buffer = self._workspace(flat.device)
        generator.manual_seed(seed)
        factor: Tensor | None = grad_scale
        if self.mode == "relative":
            norm = torch.linalg.vector_norm(flat, dtype=torch.float32)
            factor = norm / math.sqrt(flat.numel())
        for piece in torch.split(flat, buffer.numel()):
            noise = buffer[: piece.numel()].normal_(generator=generator)
            if factor is not None:
                noise.mul_(factor)
            piece.add_(noise, alpha=level)

    def _workspace(self, device: torch.device) -> tuple[torch.Generator, Tensor]:
        if device not in self._workspaces:
            chunk = CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
            buffer = torch.empty(chunk, dtype=torch.float32, device=device)
            self._workspaces[device] = (torch.Generator(device), buffer)
        return self._workspaces[device]


def all_parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield every parameter of an optimizer, group by group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _flat_view(gradient: Tensor) -> Tensor:
    """View a dense gradient as one dimension, without a copy, in the order of its memory."""
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    if not gradient.is_contiguous():
        # A transposed or channels-last gradient is contiguous in some order of its dimensions.
        # One that is in none is not dense, which autograd does not produce, and `view` says so.
        order = sorted(range(gradient.dim()), key=gradient.stride, reverse=True)
        gradient = gradient.permute(order)
    return gradient.view(-1)


def _shard_of(tensor: DTensor) -> int:
    """Number this rank's shard of a tensor; replicas of a shard get the same number."""
    coordinate = tensor.device_mesh.get_coordinate()
    shard = 0
    if coordinate is not None:
        for dimension, placement in enumerate(tensor.placements):
            if placement.is_shard():
                shard = shard * tensor.device_mesh.size(dimension) + coordinate[dimension]
    return shard


def _mix(*values: int) -> int:
    """Hash whole numbers to 63 bits, with the finaliser of SplitMix64 after each.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = 0
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
