"""Gradient noise: right in distribution, a function of its arguments, bounded in memory."""

import math
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from pulseopt_hf import AEES
from pulseopt_hf.optim import GradientNoise
from pulseopt_hf.optim.unwrap import all_parameters
from tests.conftest import take_step
from tests.optim.noise_reference import assert_right_in_distribution, noise_of


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def parameters(*shapes: tuple[int, ...], value: float = 0.0) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.full_like(parameter, value)
    return made


def noise_on(shapes: list[tuple[int, ...]], level: float = 1.0) -> list[torch.Tensor]:
    made = parameters(*shapes)
    GradientNoise(7, "absolute").add(made, level, 0)
    return [parameter.grad for parameter in made]


SHAPES = [(3,), (17, 5), (1200, 1000), (1,), (0, 4)]


def test_the_fast_noise_equals_the_reference(threads: int) -> None:
    for seed, step in ((11, 42), (12, 42), (11, 43)):  # of each the noise is another
        made = parameters(*SHAPES, value=2.0)
        GradientNoise(seed, "absolute").add(made, 0.25, step)
        for index, parameter in enumerate(made):
            if parameter.numel():
                reference = torch.full_like(parameter, 2.0)
                reference.add_(noise_of(reference, seed, step, index), alpha=0.25)
                assert torch.equal(parameter.grad, reference)


def test_noise_has_the_mean_spread_and_tails_of_its_level(threads: int) -> None:
    (noise,) = noise_on([(2_000_000,)], level=0.005)
    assert_right_in_distribution(noise, 0.005)
    # Independent from element to element.
    neighbours = (noise[1:] * noise[:-1]).mean() / 0.005**2
    assert abs(neighbours) < 4 / math.sqrt(noise.numel())


def test_the_same_arguments_give_the_same_noise_and_no_global_generator_is_read() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = noise_on(SHAPES)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for first, second in zip(one, noise_on(SHAPES), strict=True):
        assert torch.equal(first, second)


def test_a_parameter_without_a_gradient_is_passed_over_and_moves_no_other() -> None:
    made = parameters((5,), (6,), (7,))
    made[1].grad = None
    GradientNoise(7, "absolute").add(made, 1.0, 0)
    assert made[1].grad is None
    assert torch.equal(made[2].grad, noise_on([(5,), (6,), (7,)])[2])


def test_relative_noise_is_a_multiple_of_each_gradients_rms() -> None:
    made = parameters((200_000,), (100_000,))
    for scale, parameter in zip((3.0, 1e-4), made, strict=True):
        parameter.grad = torch.full_like(parameter, scale)
    GradientNoise(7, "relative").add(made, 0.5, 0)
    for scale, parameter in zip((3.0, 1e-4), made, strict=True):
        assert (parameter.grad - scale).std() == pytest.approx(0.5 * scale, rel=0.02)

    made = parameters((10,), (0,))  # on zeros it is zero
    GradientNoise(7, "relative").add(made, 0.5, 0)
    assert torch.equal(made[0].grad, torch.zeros(10))


def test_gradients_that_are_still_scaled_get_scaled_noise() -> None:
    made = parameters((100_000,))
    GradientNoise(7, "absolute").add(made, 0.1, 0, grad_scale=torch.tensor(1024.0))
    assert made[0].grad.std() == pytest.approx(102.4, rel=0.02)


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.zeros(40, 50).t(),
    "channels last": lambda: torch.zeros(4, 6, 8, 8).to(memory_format=torch.channels_last),
    "bfloat16": lambda: torch.zeros(2000, dtype=torch.bfloat16),
    "float64": lambda: torch.zeros(2000, dtype=torch.float64),
    "complex": lambda: torch.zeros(1000, dtype=torch.complex64),
    "scalar": lambda: torch.zeros(()),
}


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_type_of_gradient_gets_noise_in_place(layout: str, mode: str) -> None:
    value = 0.0 if mode == "absolute" else 4.0
    gradient = torch.full_like(LAYOUTS[layout](), value)
    parameter = nn.Parameter(torch.empty_like(gradient))
    parameter.grad = gradient
    GradientNoise(7, mode).add([parameter], 0.5, 0)
    assert parameter.grad is gradient
    added = gradient - value
    added = torch.view_as_real(added) if added.is_complex() else added
    rms = value / (2**0.5 if gradient.is_complex() else 1.0)  # of real and imaginary parts
    if mode == "absolute":
        assert (added != 0).all()
    if gradient.numel() > 1:
        assert added.double().std() == pytest.approx(0.5 * (rms or 1.0), rel=0.1)


def test_rows_of_a_sparse_gradient_get_noise_once_and_the_others_none() -> None:
    embedding = nn.Embedding(50, 400, sparse=True)
    embedding(torch.tensor([3, 7, 7, 7])).sum().backward()
    GradientNoise(7, "absolute").add([embedding.weight], 0.5, 0)
    dense = embedding.weight.grad.to_dense()
    assert torch.count_nonzero(dense[[i for i in range(50) if i not in (3, 7)]]) == 0
    assert (dense[3] - 1).std() == pytest.approx(0.5, rel=0.2)
    assert (dense[7] - 3).std() == pytest.approx(0.5, rel=0.2)


def test_sparse_gradients_train_under_sparse_adam() -> None:
    embedding = nn.Embedding(50, 4, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    aees = AEES(optimizer, lr_candidates=[2.0], noise_candidates=[0.1], seed=0)
    for step in range(3):
        take_step(aees, step, lambda: embedding(torch.tensor([1, 2, 2])).pow(2).mean())
    moved = (embedding.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [1, 2]


def test_the_update_is_the_plain_one_on_a_noisy_gradient() -> None:
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    aees = AEES(optimizer, noise_candidates=[0.1], seed=5)
    total = torch.zeros(1000)
    for step in range(3):
        aees.step_start(step)
        parameter.grad = torch.ones(1000)
        aees.step_end(1.0)
        total -= 0.5 * torch.ones(1000).add(noise_of(parameter, 5, step, 0), alpha=0.1)
    torch.testing.assert_close(parameter.detach(), total)


def test_the_noise_of_a_large_model_takes_little_memory() -> None:
    made = parameters((2_000, 4_000), (3_000, 2_000))  # 56 MB of gradients
    source = GradientNoise(7, "absolute")
    source.add(made, 1.0, 0)
    held = sum(
        buffer.numel() * buffer.element_size()
        for _, buffer in source._workspaces.__dict__.get("made", {}).values()
    )
    assert 0 < held <= 512 * 1024  # on this thread, which is the only one here
    # What torch allocates does not show in tracemalloc; what Python keeps does.
    tracemalloc.start()
    source.add(made, 1.0, 1)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_parameters_come_in_the_order_of_the_groups() -> None:
    made = parameters((1,), (2,), (3,))
    optimizer = torch.optim.SGD([{"params": made[1:]}, {"params": made[:1]}], lr=0.1)
    assert [p.numel() for p in all_parameters(optimizer)] == [2, 3, 1]
