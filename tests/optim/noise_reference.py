"""The noise as slowly and plainly as it can be written, to hold the fast one against."""

import math

import pytest
import torch
from torch import Tensor

BLOCK, CHUNK = 1 << 19, 1 << 17


def splitmix(seed: int, step: int, parameter: int, shard: int, block: int) -> int:
    state = 0
    for value in (seed, step, parameter, shard, block):
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state = state ^ (state >> 31)
    return state // 2


def assert_right_in_distribution(noise: Tensor, level: float) -> None:
    """Check mean, spread and tails of noise of a level."""
    unit, count = noise.double() / level, noise.numel()
    assert abs(unit.mean()) < 4 / math.sqrt(count)
    assert unit.std().item() == pytest.approx(1.0, rel=4 / math.sqrt(2 * count))
    beyond_two = (unit.abs() > 2.0).double().mean().item()
    assert beyond_two == pytest.approx(0.0455, abs=4 * math.sqrt(0.0455 / count))


def noise_of(gradient: Tensor, seed: int, step: int, parameter: int, shard: int = 0) -> Tensor:
    """Return unit noise of a contiguous gradient, of its shape, with every piece a new tensor."""
    pieces = []
    for block, size in enumerate(gradient.flatten().split(BLOCK)):
        generator = torch.Generator().manual_seed(splitmix(seed, step, parameter, shard, block))
        for chunk in size.split(CHUNK):
            pieces.append(torch.empty(chunk.numel()).normal_(generator=generator))
    return torch.cat(pieces).view(gradient.shape)
