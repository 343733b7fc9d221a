"""The slope as a reward, and the limits of both; the smoothed one is compared with `pulseopt`."""

import math
import random
import statistics
from typing import Any

import numpy as np
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


@pytest.mark.parametrize("kind", ["smoothed", "slope"])
@given(loss=st.floats(1e-3, 1e3), length=st.integers(1, 20))
def test_a_constant_loss_earns_nothing(kind: str, loss: float, length: int) -> None:
    reward = episode_reward([loss] * length, kind=kind, **PUBLISHED)
    assert reward.reward == pytest.approx(0.0, abs=1e-9)


@given(losses=losses, scale=st.floats(0.1, 10.0))
def test_the_slope_is_that_of_the_best_line_and_has_no_unit(losses, scale):
    reward = episode_reward(losses, kind="slope", **PUBLISHED)
    slope = np.polyfit(range(len(losses)), losses, 1)[0] if len(losses) > 1 else 0.0
    fall = -slope * (len(losses) - 1) / (statistics.fmean(losses) + 1e-8)
    assert reward.reward_base == pytest.approx(fall, abs=1e-6)
    scaled = episode_reward([scale * loss for loss in losses], kind="slope", **PUBLISHED)
    assert scaled.reward_base == pytest.approx(reward.reward_base, abs=1e-4)


def test_the_noise_of_the_slope_lessens_with_the_length_as_it_is_said_to() -> None:
    """By sqrt(12 / n) of the losses' own, where the smoothed reward's stays near theirs."""
    rng = random.Random(0)

    def noise(kind: str, length: int) -> float:
        knobs = {**PUBLISHED, "clip_min": -9.0, "clip_max": 9.0, "kind": kind}
        episodes = ([rng.gauss(10.0, 1.0) for _ in range(length)] for _ in range(4000))
        return statistics.pstdev(episode_reward(losses, **knobs).reward for losses in episodes)

    for length in (20, 100):
        assert noise("slope", length) == pytest.approx(0.1 * math.sqrt(12 / length), rel=0.1)
        assert noise("smoothed", length) > 0.08


@pytest.mark.parametrize(
    ("losses", "kind", "message"),
    [
        ([1.0, 0.5], "ema", "'smoothed' or 'slope', got 'ema'"),
        ([], "smoothed", "at least one loss"),
        ([-1.0, -2.0], "smoothed", r"logarithm of the loss.*-1"),
        *(([1.0, 1.0, bad], "smoothed", "position 2") for bad in (math.nan, math.inf, -math.inf)),
    ],
)
def test_what_has_no_reward_is_refused(losses: list[float], kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        episode_reward(losses, kind=kind, **PUBLISHED)


@pytest.mark.parametrize("shift", [-10.0, -1.5, -1.0, 0.0, 5.0])
def test_the_slope_rewards_a_fall_of_a_loss_of_any_sign(shift: float) -> None:
    losses = [1.5 - 0.1 * k + shift for k in range(11)]
    falling = episode_reward(losses, kind="slope", **PUBLISHED)
    rising = episode_reward(losses[::-1], kind="slope", **PUBLISHED)
    assert falling.reward > 0 > rising.reward
    assert math.isfinite(falling.reward_instability)


@pytest.mark.parametrize("kind", ["smoothed", "slope"])
def test_losses_of_zero_have_a_reward(kind: str) -> None:
    assert episode_reward([0.0] * 4, kind=kind, **PUBLISHED).reward == 0.0
