"""How far a step moves the parameters, exactly or estimated."""

import json

import pytest
import torch
from torch import nn

from pulseopt_hf.optim.update_norm import UpdateNorm


def moved(elements: int, limit: int) -> tuple[float | None, float]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(elements, generator=generator)) for _ in range(3)]
    norm, truth = UpdateNorm(parameters, max_elements=limit), []
    for _ in range(2):
        norm.before_step()
        squares = 0.0
        for parameter in parameters:
            change = torch.randn(elements, generator=generator)
            parameter.data += change
            squares += change.double().square().sum().item()
        norm.after_step()
        truth.append(squares**0.5)
    return norm.mean(), sum(truth) / 2


def test_the_norm_of_a_small_model_is_exact() -> None:
    measured, truth = moved(1000, limit=3000)
    assert measured == pytest.approx(truth, rel=1e-5)


def test_the_norm_of_a_large_model_is_estimated_from_a_bounded_part() -> None:
    measured, truth = moved(100_000, limit=30_000)
    assert measured != pytest.approx(truth, rel=1e-5)
    assert measured == pytest.approx(truth, rel=0.03)


def test_the_mean_starts_anew_and_is_none_without_a_step() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    norm = UpdateNorm([parameter])
    assert norm.mean() is None
    norm.before_step()
    parameter.data += 1
    norm.after_step()
    assert norm.mean() == 2.0
    assert norm.mean() is None


def test_a_norm_that_overflows_is_none_also_from_a_saved_state() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    norm, resumed = UpdateNorm([parameter]), UpdateNorm([parameter])
    for far in (1.0, 1e30):
        norm.before_step()
        parameter.data += far
        norm.after_step()
    resumed.restore(json.loads(json.dumps(norm.state(), allow_nan=False)))
    assert norm.mean() is None
    assert resumed.mean() is None
