"""A deadly arm is cut short, rewarded lowest and, with `rollback`, undone."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pulseopt_hf import AEES
from pulseopt_hf.optim.divergence import CUT, ROLLED_BACK, DivergenceGuard
from tests.conftest import take_step


def run(lr_candidates: list[float], steps: int = 240, **knobs: Any) -> tuple[Any, float]:
    """Fit a small network to a fixed function by Adam; return the AEES and the loss at the end."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    held_out = torch.randn(512, 8, generator=generator)

    def loss_on(x: Any) -> Any:
        return (model(x) - x[:, :1].sin() * x[:, 1:2] - 1.0).square().mean() + 0.1

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    aees = AEES(
        optimizer, lr_candidates=lr_candidates, episode_length=10, seed=0, nonfinite="skip", **knobs
    )
    for step in range(steps):
        batch = torch.randn(32, 8, generator=generator)
        take_step(aees, step, partial(loss_on, batch))
        assert optimizer.param_groups[0]["lr"] == 0.005
    aees.finalize()
    return aees, loss_on(held_out).item()


def test_with_a_deadly_candidate_the_run_ends_as_well_as_without() -> None:
    """Within 5 %; unguarded it does not, and so the candidate is deadly."""
    _, without = run([0.5, 1.0, 2.0])
    guarded, with_rollback = run([0.5, 1.0, 2.0, 100.0], divergence="rollback")
    _, unguarded = run([0.5, 1.0, 2.0, 100.0])
    assert with_rollback <= 1.05 * without
    assert unguarded > 1.05 * without
    logs = guarded.get_logs()
    outcomes = dict(zip(logs["selected_lr_values"], logs["episode_outcomes"], strict=True))
    for record in guarded.controller.records:
        if record.outcome is not None:
            assert record.outcome == ROLLED_BACK
            assert record.reward == -1.0
            assert record.end_step - record.start_step < 10
    assert outcomes[100.0] == ROLLED_BACK
    assert [outcomes[value] for value in (0.5, 1.0, 2.0)] == [None] * 3


def test_cut_leaves_the_parameters_where_they_are() -> None:
    aees, _ = run([1.0, 100.0], steps=60, divergence="cut")
    assert CUT in aees.get_logs()["episode_outcomes"]


def test_a_guard_that_is_never_needed_changes_nothing() -> None:
    plain, loss = run([0.5, 1.0, 2.0])
    for mode in ("cut", "rollback"):
        guarded, same = run([0.5, 1.0, 2.0], divergence=mode)
        assert same == loss
        logs = guarded.get_logs()
        assert set(logs.pop("episode_outcomes")) == {None}
        assert logs == plain.get_logs()


def small_run(parameter: Any) -> tuple[AEES, Callable[[int, float], None]]:
    """Return an AEES with `rollback`, and what takes a step of it whose loss is multiplied."""
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    knobs: dict[str, Any] = {"episode_length": 5, "nonfinite": "skip", "divergence": "rollback"}
    aees = AEES(optimizer, lr_candidates=[1.0, 2.0], seed=0, **knobs)

    def step(number: int, factor: float = 1.0) -> None:
        aees.step_start(number)
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        aees.step_end(loss * factor)

    return aees, step


def test_steps_that_stay_non_finite_end_the_episode() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    aees, step = small_run(parameter)
    for number in range(8):
        step(number, 1.0 if number < 2 else math.nan)
    first = aees.get_logs()
    assert first["episode_outcomes"] == [ROLLED_BACK, ROLLED_BACK]
    assert first["episode_end_steps"] == [4, 7]
    assert parameter.tolist() == [1.0, 1.0]


def test_a_loop_resumed_amid_an_episode_goes_back_to_where_it_was_resumed() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    aees, step = small_run(parameter)
    step(0)
    state, then = aees.state_dict(), parameter.tolist()
    step(1)  # what is loaded into has begun an episode of its own
    aees.load_state_dict(state)
    with torch.no_grad():
        parameter.copy_(torch.tensor(then))  # as a loop loads the model after AEES
    for number in range(1, 5):
        step(number, 1.0 if number == 1 else math.nan)
    assert aees.get_logs()["episode_outcomes"] == [ROLLED_BACK]
    assert parameter.tolist() == then != [1.0, 1.0]


def test_it_looks_a_few_times_an_episode() -> None:
    assert [n for n in range(1, 51) if DivergenceGuard.looks(n, 50)] == [4, 8, 16, 32, 50]
    assert [n for n in range(1, 4) if DivergenceGuard.looks(n, 3)] == [3]
