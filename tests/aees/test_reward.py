"""The reward against its equation and its limits."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulseopt_hf.aees import episode_reward

PUBLISHED: dict[str, Any] = {
    "ema_alpha": 0.1,
    "instability_lambda": 0.0,
    "epsilon": 1e-8,
    "clip_min": -1.0,
    "clip_max": 1.0,
}
losses = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=50)


@given(losses=losses, alpha=st.floats(0.01, 1.0), weight=st.floats(0.0, 2.0))
def test_the_reward_equals_its_equation(losses: list[float], alpha: float, weight: float) -> None:
    knobs = {**PUBLISHED, "ema_alpha": alpha, "instability_lambda": weight}
    reward = episode_reward(losses, **knobs)
    n = len(losses)
    # The closed form of e_n = a * l_n + (1 - a) * e_(n-1).
    ema = (1 - alpha) ** (n - 1) * losses[0] + sum(
        alpha * (1 - alpha) ** (n - 1 - k) * losses[k] for k in range(1, n)
    )
    instability = statistics.pvariance(losses) / (statistics.fmean(losses) ** 2 + 1e-8)
    assert reward.ema_end == pytest.approx(ema)
    assert reward.base == pytest.approx(math.log(losses[0] / ema), abs=1e-4)
    assert reward.instability == pytest.approx(instability, abs=1e-9)
    assert reward.unclipped == reward.base - reward.penalty
    assert reward.value == min(1.0, max(-1.0, reward.unclipped))


@given(losses=losses, scale=st.floats(0.1, 10.0))
def test_the_reward_does_not_depend_on_the_unit_of_the_loss(
    losses: list[float], scale: float
) -> None:
    one = episode_reward(losses, **PUBLISHED)
    other = episode_reward([scale * loss for loss in losses], **PUBLISHED)
    assert one.value == pytest.approx(other.value, abs=1e-3)


@given(loss=st.floats(1e-3, 1e3), length=st.integers(1, 20))
def test_a_constant_loss_earns_nothing(loss: float, length: int) -> None:
    assert episode_reward([loss] * length, **PUBLISHED).value == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_with_its_place(bad: float) -> None:
    with pytest.raises(ValueError, match="position 2"):
        episode_reward([1.0, 1.0, bad], **PUBLISHED)


def test_a_negative_loss_has_no_logarithm() -> None:
    with pytest.raises(ValueError, match=r"positive loss.*-1"):
        episode_reward([-1.0, -2.0], **PUBLISHED)


def test_an_episode_without_losses_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one loss"):
        episode_reward([], **PUBLISHED)


def test_a_loss_of_zero_has_a_reward() -> None:
    assert episode_reward([0.0, 0.0], **PUBLISHED).value == 0.0
