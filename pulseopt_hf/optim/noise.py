"""Gradient noise that needs no state and no copy of the model.

The noise of one gradient is a function of (seed, optimizer step, parameter index, shard): the same
on every replica, different on every shard, and the same again after a resume, because there is no
generator whose state would have to be kept. Nothing here reads the device or touches the global
generators.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pulseopt_hf.optim.scalars import norm

# A gradient is cut into blocks with a seed each, so that blocks can be drawn in any order, and a
# block is drawn in chunks: on a CPU small enough for the cache and large enough that threads do not
# queue for the interpreter, on an accelerator large enough to be worth a kernel launch. The values
# depend on both sizes, so they are part of the function.
CPU_BLOCK = 1 << 19
CPU_CHUNK = 1 << 17  # 512 KiB of float32
ACCELERATOR_BLOCK = 1 << 22  # 16 MiB of float32

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
        self.seed = seed
        self.mode = mode
        self._workspaces = threading.local()
        self._pool: ThreadPoolExecutor | None = None

    def reseed(self, seed: int) -> None:
        """Take another seed, such as rank 0's."""
        self.seed = seed

    @torch.no_grad()
    def add(
        self,
        parameters: Iterable[Tensor],
        level: float,
        step: int,
        grad_scale: Tensor | None = None,
        *,
        shard: int = 0,
        first_index: int = 0,
    ) -> int:
        """Add the noise of one optimizer step to every gradient that there is.

        Args:
            parameters: all parameters of the optimizer, in its order; the position of one is its
                index. Those without a gradient are passed over.
            level: noise level, > 0.
            step: number of optimizer steps taken before this one.
            grad_scale: factor that the gradients still carry from loss scaling, shape (), or
                `None`. The noise is scaled alike.
            shard: number of this rank's part, where the parameters are parts of an engine's
                making. That of a `DTensor` is found out.
            first_index: index of the first parameter, where an engine updates them in several
                calls.

        Returns:
            The index after the last parameter.
        """
        blocks: list[_Block] = []
        index = first_index - 1
        for index, parameter in enumerate(parameters, first_index):
            gradient = parameter.grad
            if gradient is None:
                continue
            part = shard
            if isinstance(gradient, DTensor):
                part, gradient = _shard_of(gradient), gradient.to_local()
            if gradient.is_sparse:
                # Rows that got no gradient get no noise. Duplicates are summed first, or the noise
                # of a row would grow with how often it was looked up.
                parameter.grad = gradient.coalesce()
                gradient = parameter.grad._values()
            flat = _flat_view(gradient)
            factor = grad_scale
            if self.mode == "relative":
                factor = norm(flat) / math.sqrt(max(1, flat.numel()))
            size = CPU_BLOCK if flat.device.type == "cpu" else ACCELERATOR_BLOCK
            for number, piece in enumerate(torch.split(flat, size)):
                seed = _mix(self.seed, step, index, part, number)
                blocks.append(_Block(piece, seed, level, factor))
        self._draw(blocks)
        return index + 1

    def _draw(self, blocks: list[_Block]) -> None:
        """Draw every block, on a CPU with as many threads as torch may use.

        Torch draws normals on one thread, and this is what noise costs on a CPU. Its operators let
        go of the interpreter, so Python threads run side by side.
        """
        threads = torch.get_num_threads()
        if threads == 1 or len(blocks) < 2 or blocks[0].gradient.device.type != "cpu":
            for block in blocks:
                self._draw_block(block)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gradient-noise")
        # Consuming the results is what raises an exception of a thread here.
        list(self._pool.map(self._draw_share, [blocks[i::threads] for i in range(threads)]))

    @torch.no_grad()
    def _draw_share(self, blocks: list[_Block]) -> None:
        for block in blocks:
            self._draw_block(block)

    def _draw_block(self, block: _Block) -> None:
        generator, buffer = self._workspace(block.gradient.device)
        generator.manual_seed(block.seed)
        for piece in torch.split(block.gradient, buffer.numel()):
            noise = buffer[: piece.numel()].normal_(generator=generator)
            if block.factor is not None:
                noise.mul_(block.factor)
            piece.add_(noise, alpha=block.level)

    def _workspace(self, device: torch.device) -> tuple[torch.Generator, Tensor]:
        """Return this thread's generator and buffer for a device."""
        made: dict[torch.device, tuple[torch.Generator, Tensor]]
        made = self._workspaces.__dict__.setdefault("made", {})
        if device not in made:
            chunk = CPU_CHUNK if device.type == "cpu" else ACCELERATOR_BLOCK
            buffer = torch.empty(chunk, dtype=torch.float32, device=device)
            made[device] = (torch.Generator(device), buffer)
        return made[device]


class _Block(NamedTuple):
    """A part of a gradient, shape (n,), and the noise that is to be added to it."""

    gradient: Tensor
    seed: int
    level: float
    factor: Tensor | None


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
