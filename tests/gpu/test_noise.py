"""Gradient noise on a GPU is right in distribution and a function of its arguments."""

import math

import pytest
import torch
from torch import nn

from pulseopt_hf.optim import GradientNoise
from pulseopt_hf.optim.noise import ACCELERATOR_BLOCK
from tests.optim.noise_reference import assert_right_in_distribution

pytestmark = pytest.mark.gpu

COUNT = 2 * ACCELERATOR_BLOCK + 1001  # two blocks and a part


def noise(count: int, *, seed: int = 7, step: int = 0, index: int = 0) -> torch.Tensor:
    parameter = nn.Parameter(torch.zeros(count, device="cuda"))
    parameter.grad = torch.zeros_like(parameter)
    GradientNoise(seed, "absolute").add([parameter], 0.005, step, first_index=index)
    return parameter.grad.double() / 0.005


def test_mean_spread_tails_and_independence() -> None:
    drawn = noise(COUNT)
    assert_right_in_distribution(drawn, 1.0)
    for lag in (1, 2, 128, ACCELERATOR_BLOCK):  # to the neighbour, and from block to block
        product = (drawn[lag:] * drawn[:-lag]).mean()
        assert abs(product) < 4 / math.sqrt(COUNT - lag), lag


@pytest.mark.parametrize("other", [{"seed": 8}, {"step": 1}, {"index": 1}])
def test_every_seed_step_and_parameter_has_noise_of_its_own(other: dict[str, int]) -> None:
    assert abs((noise(COUNT) * noise(COUNT, **other)).mean()) < 4 / math.sqrt(COUNT)


def test_the_same_arguments_give_the_same_noise_and_no_global_generator_is_read() -> None:
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state()
    one = noise(COUNT)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    torch.cuda.manual_seed(2)
    assert torch.equal(one, noise(COUNT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_of_gradient_gets_noise(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(100_000, device="cuda", dtype=dtype))
    parameter.grad = torch.full_like(parameter, 2.0)
    GradientNoise(7, "relative").add([parameter], 0.5, 0)
    assert (parameter.grad.double() - 2.0).std().item() == pytest.approx(1.0, rel=0.02)
