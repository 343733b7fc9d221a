"""`AEES` in a hand-written loop: parity with `pulseopt`, transience, order of calls, state."""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pulseopt import AEES as PublishedAEES
from torch import nn

from pulseopt_hf import AEES
from pulseopt_hf.aees import StateError
from tests.conftest import ARMS, give_losses, take_step

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 8, generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch[:, :4]).pow(2).mean()


def bare(lr: float = 0.1, **knobs: Any) -> AEES:
    """Return an AEES of a model without gradients."""
    return AEES(torch.optim.SGD(small_model().parameters(), lr=lr), **knobs)


def with_gradients(aees: AEES, value: float) -> list[nn.Parameter]:
    """Return the parameters, after setting their gradients."""
    parameters = aees.optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)
    return parameters


def train(make_aees, optimizer_name, steps, **knobs):
    model = small_model()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    aees = make_aees(optimizer, lr_scheduler=scheduler, seed=3, **knobs)
    for step, batch in enumerate(batches(steps)):
        aees.step_start(step)
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        aees.step_end(loss)
    aees.finalize()
    return model, aees


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_300_steps_end_bit_equal_to_the_published_package(optimizer_name: str) -> None:
    knobs = {"lr_candidates": [0.5, 1.0, 2.0], "episode_length": 7}
    published_model, published = train(PublishedAEES, optimizer_name, 300, **knobs)
    model, aees = train(AEES, optimizer_name, 300, **knobs, log_update_norm=True)
    for ours, theirs in zip(model.parameters(), published_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    logs, published_logs = aees.get_logs(), published.get_logs()
    norms = logs.pop("mean_update_norms")
    assert norms == pytest.approx(published_logs.pop("mean_update_norms"), rel=1e-5)
    assert logs == published_logs
    assert len(set(logs["selected_lr_values"])) == 3


def test_an_exception_in_the_step_leaves_the_base_lr_behind() -> None:
    aees = bare(0.25, lr_candidates=[3.0])
    group = aees.optimizer.param_groups[0]

    def fail(*_: Any) -> None:
        assert group["lr"] == 0.75
        raise KeyboardInterrupt

    aees.optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        give_losses(aees, [1.0])
    assert group["lr"] == 0.25


def test_the_current_candidate_is_there_between_start_and_end_only() -> None:
    aees = bare(seed=0)
    assert aees.current_candidate is None
    arm = aees.step_start(0)
    assert (arm.name, arm.lr_multiplier, arm.noise_std) == ("lr1_n0", 1.0, 0.0)
    assert aees.current_candidate is arm
    aees.step_end(1.0)
    assert aees.current_candidate is None


def test_calls_out_of_order_raise_and_say_what_to_call() -> None:
    aees = bare()
    with pytest.raises(RuntimeError, match="call `step_start`"):
        aees.step_end(1.0)
    aees.step_start(0)
    with pytest.raises(RuntimeError, match="called twice"):
        aees.step_start(1)


@pytest.mark.parametrize("step", [-1, 1.5, True, None, "1"])
def test_a_global_step_that_is_no_step_is_refused(step: Any) -> None:
    message = f"`global_step` must be a whole number >= 0, got {step!r}"
    with pytest.raises(ValueError, match=message):
        bare().step_start(step)


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_not_finite_raises_before_the_update_as_published(loss: Any) -> None:
    aees = bare()
    aees.step_start(5)
    now = with_gradients(aees, 1.0)
    with pytest.raises(ValueError, match=r"`loss` must be finite, got .* at global step 5"):
        aees.step_end(loss)
    assert all(map(torch.equal, now, small_model().parameters()))
    aees.step_end(1.0)  # the step stayed open, for the loop to end as it sees fit


def test_a_skipped_step_counts_nowhere() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    aees = AEES(optimizer, lr_scheduler=scheduler, episode_length=2, nonfinite="skip")
    for step, loss in enumerate([3.0, math.nan, 2.0, 1.0, math.inf]):
        with_gradients(aees, loss)
        give_losses(aees, [loss], first=step)
    assert aees.skipped_steps == 2
    assert optimizer.param_groups[0]["lr"] == 0.1 / 8
    logs = aees.get_logs()
    assert logs["episode_start_losses"] == [3.0]
    assert logs["episode_end_losses"] == [2.0]
    assert logs["episode_end_steps"] == [2]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_too_many_skips_in_a_row_end_the_run_with_their_number_and_place() -> None:
    aees = bare(nonfinite="skip", max_consecutive_skips=3)
    give_losses(aees, [math.nan] * 2)
    with pytest.raises(RuntimeError, match=r"3 optimizer steps in a row .* global step 2"):
        give_losses(aees, [math.nan], first=2)


def test_a_partial_episode_is_closed_by_finalize_once() -> None:
    aees = bare(episode_length=5)
    aees.finalize()
    give_losses(aees, [torch.tensor(1.0)] * 7)
    aees.step_start(7)  # a step that is begun and never ended leaves no trace
    aees.finalize()
    aees.finalize()
    assert aees.get_logs()["episode_end_steps"] == [4, 6]


def test_a_loss_tensor_is_read_when_it_is_given_not_when_the_episode_ends() -> None:
    aees = bare(episode_length=2)
    loss = torch.tensor(2.0)
    for step in range(2):
        give_losses(aees, [loss], first=step)
        loss /= 2
    assert aees.get_logs()["episode_start_losses"] == [2.0]
    assert aees.get_logs()["episode_end_losses"] == [1.0]


KNOBS: dict[str, Any] = {**ARMS, "episode_length": 4, "seed": 3}
MODES = [
    {},
    {"context_mode": "trend", "structured_control_mode": "conditional"},
    {"control_mode": "random", "noise_mode": "relative"},
]


@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("stop", [1, 4, 6, 23])
def test_a_loop_resumed_at_any_step_ends_as_if_never_stopped(modes, stop):
    def run(model: nn.Module, aees: AEES, steps: range) -> None:
        for step in steps:
            take_step(aees, step, partial(loss_of, model, data[step]))

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, AEES]:
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, AEES(optimizer, **{**KNOBS, **modes})

    data = batches(40)
    whole_model, _, whole = fresh()
    run(whole_model, whole, range(40))
    model, optimizer, aees = fresh()
    run(model, aees, range(stop))
    saved = json.loads(json.dumps(aees.state_dict()))
    weights, moments = model.state_dict(), optimizer.state_dict()
    model, optimizer, aees = fresh()
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    aees.load_state_dict(saved)
    run(model, aees, range(stop, 40))
    assert aees.get_logs() == whole.get_logs()
    assert aees.state_dict() == whole.state_dict()
    for one, other in zip(model.parameters(), whole_model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_listeners_hear_of_each_episode_once_and_not_again_in_a_resumed_run() -> None:
    def run(aees: AEES, steps: range) -> list[Any]:
        heard: list[Any] = []
        aees.listeners.append(heard.append)
        give_losses(aees, [1.0] * len(steps), first=steps[0])
        aees.finalize()
        return heard

    one, other = bare(**KNOBS), bare(**KNOBS)
    first = run(one, range(9))
    assert [(episode.number, episode.record.end_step) for episode in first] == [
        *((1, 3), (2, 7)),
        (3, 8),  # closed by `finalize`
    ]
    other.load_state_dict(one.state_dict())
    second = run(other, range(9, 13))
    assert [episode.number for episode in second] == [4]
    assert list(other.events()) == first + second


def test_a_state_with_too_many_losses_or_no_episode_for_them_is_refused() -> None:
    aees = bare(**KNOBS)
    for losses, message in (
        ([1.0] * 4, "4 losses, and an episode 4"),
        ([1.0] * 2, "2 losses, but no episode is open"),
        ([math.nan], r"`losses\[0\]` must be finite"),
    ):
        with pytest.raises(StateError, match=message):
            aees.load_state_dict({**aees.state_dict(), "losses": losses})


def test_a_seed_drawn_from_the_system_travels_with_the_state() -> None:
    one, other = bare(lr_candidates=[1.0, 2.0]), bare(lr_candidates=[1.0, 2.0])
    assert one.state_dict() != other.state_dict()
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
