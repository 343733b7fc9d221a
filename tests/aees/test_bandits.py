"""One contract for every bandit, and what those do beyond it that `pulseopt` does not have."""

import functools
import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulseopt_hf.aees import (
    Bandit,
    ConservativeUCB,
    DiscountedUCB,
    RandomBandit,
    ScaledUCB,
    StateError,
    TrendBandit,
)
from pulseopt_hf.aees.context import BUCKETS

BANDITS: list[Callable[[int, int | None], Bandit]] = [
    DiscountedUCB,
    ScaledUCB,
    ConservativeUCB,
    RandomBandit,
    TrendBandit,
    functools.partial(TrendBandit, bandit=ConservativeUCB),
]
contract = pytest.mark.parametrize("make", BANDITS)

rewards = st.lists(st.floats(-1.0, 1.0), max_size=40)
contexts = st.sampled_from(BUCKETS)


def play(bandit: Bandit, history: list[float], context: str = "stable") -> list[int]:
    arms = []
    for reward in history:
        arms.append(bandit.select(context))
        bandit.update(arms[-1], reward, context)
    return arms


def play_rewards(bandit: Bandit, reward: Callable[[int], float], episodes: int) -> list[int]:
    """Play a bandit whose rewards follow from the arm, and return the arms."""
    played = []
    for _ in range(episodes):
        played.append(bandit.select())
        bandit.update(played[-1], reward(played[-1]))
    return played


@contract
@given(arms=st.integers(1, 6), seed=st.integers(0, 2**32), history=rewards, context=contexts)
def test_a_choice_is_always_one_of_the_arms(make, arms, seed, history, context):
    assert all(0 <= arm < arms for arm in play(make(arms, seed), history, context))


@contract
@given(seed=st.integers(0, 2**32), history=rewards)
def test_equal_seeds_and_rewards_make_equal_choices(make, seed, history):
    assert play(make(4, seed), history) == play(make(4, seed), history)


@contract
@given(seed=st.integers(0, 2**32), before=rewards, after=rewards, context=contexts)
@settings(max_examples=50)
def test_a_restored_bandit_goes_on_as_if_never_saved(make, seed, before, after, context):
    bandit = make(3, seed)
    play(bandit, before)
    state = json.loads(json.dumps(bandit.state_dict()))
    # A bucket of the trend context that is yet to come is seeded from the bandit's own seed.
    restored = make(3, seed)
    restored.load_state_dict(state)
    assert restored.state_dict() == bandit.state_dict()
    assert play(restored, after, context) == play(bandit, after, context)


@contract
def test_a_state_of_another_kind_or_size_is_refused_and_changes_nothing(make):
    bandit = make(3, 0)
    before = bandit.state_dict()
    others = [other(3, 1).state_dict() for other in BANDITS if other is not make]
    for state in [*others, make(4, 1).state_dict(), {}, [], None, {**before, "rng": [1, 2]}]:
        with pytest.raises(StateError):
            bandit.load_state_dict(state)
        assert bandit.state_dict() == before


@given(seed=st.integers(0, 2**32))
def test_scaled_ucb_plays_every_arm_twice_before_it_judges(seed: int) -> None:
    assert sorted(play(ScaledUCB(3, seed), [1.0] * 6)) == [0, 0, 1, 1, 2, 2]


def test_scaled_ucb_does_not_see_the_unit_of_the_rewards() -> None:
    rng = random.Random(0)
    history = [rng.gauss(0.3, 1.0) for _ in range(80)]
    shifted = [0.001 * reward - 7.0 for reward in history]
    assert play(ScaledUCB(3, 5), history) == play(ScaledUCB(3, 5), shifted)


def test_rewards_that_shrink_for_every_arm_do_not_hold_up_the_first_one_played() -> None:
    """As the loss falls more slowly, any arm is rewarded less than those before it."""

    def best_share(bandit: Bandit, seed: int) -> float:
        rng, plays = random.Random(seed), 0
        for episode in range(60):
            arm = bandit.select()
            plays += arm == 2
            falling = 0.2 * math.exp(-episode / 15)
            bandit.update(arm, falling + 0.03 * (arm == 2) + rng.gauss(0.0, 0.03))
        return plays / 60

    scaled, published = (
        sum(best_share(make(3, seed), 1000 + seed) for seed in range(100)) / 100
        for make in (ScaledUCB, DiscountedUCB)
    )
    assert published < 0.4
    assert scaled > 2 * published * 0.9


def rewards_of(arms: tuple[float, ...], episodes: int, noise: float, seed: int = 0) -> list[int]:
    """Play a conservative bandit whose baseline is arm 1, and return the arms it played."""
    bandit, rng = ConservativeUCB(len(arms), seed, baseline=1), random.Random(seed)
    return play_rewards(bandit, lambda arm: arms[arm] + rng.gauss(0.0, noise), episodes)


def test_a_conservative_bandit_rests_before_it_compares_and_tries_in_a_quarter_of_episodes():
    played = rewards_of((0.0, 0.0, 0.0), 46, noise=1.0)
    assert played[:6] == [1] * 6
    tried = [index for index, arm in enumerate(played) if arm != 1]
    assert tried
    assert {played[index] for index in tried} == {0, 2}
    assert len(tried) <= 40 / 4 + 3  # an arm may seem better for a while


def test_a_conservative_bandit_goes_on_with_what_is_shown_to_be_better() -> None:
    shares = [rewards_of((0.0, 0.0, 3.0), 100, 1.0, seed).count(2) / 100 for seed in range(20)]
    assert sum(shares) / 20 > 0.6
    # An arm that harms is tried no more.
    shares = [rewards_of((-3.0, 0.0), 100, 1.0, seed).count(0) / 100 for seed in range(20)]
    assert sum(shares) / 20 < 0.1


def test_what_an_arm_wins_and_its_return_loses_again_is_no_lead() -> None:
    """A lower LR shows a lower loss at once, and a higher one as soon as the LR is back."""
    bandit, rng, previous, played = ConservativeUCB(2, 0, baseline=1), random.Random(0), 1, []
    for _ in range(100):
        arm = bandit.select()
        bandit.update(arm, 3.0 * (previous - arm) + rng.gauss(0.0, 1.0))
        played.append(arm)
        previous = arm
    assert 10 < played.count(0) < 40
    assert abs(bandit.lead(0)[0]) < 1.0  # of 3 that it shows in its own episode


def test_a_conservative_bandit_plays_only_what_may_be_played_now() -> None:
    bandit = ConservativeUCB(3, 0, baseline=1)
    for _ in range(60):
        arm = bandit.select(playable=[0])
        assert arm in (0, 1)
        bandit.update(arm, 0.0)
    assert bandit.plays[0] > 0
    assert bandit.select(playable=[]) == 1


def test_the_trend_bandit_refuses_a_context_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="improving, stable, worsening"):
        TrendBandit(2, 0).select("sideways")


@pytest.mark.parametrize("winner", [0, 1])
def test_a_conservative_bandit_outlives_what_its_discounts_leave_of_an_arm(winner: int) -> None:
    """Rewards that do not scatter leave no doubt, so the other arm is never played again."""
    bandit = ConservativeUCB(2, 0, baseline=1)
    play_rewards(bandit, lambda arm: float(arm == winner), 20_000)
    assert min(bandit.counts) < 1e-300
    restored = ConservativeUCB(2, 1, baseline=1)
    restored.load_state_dict(json.loads(json.dumps(bandit.state_dict())))
    assert restored.select() == bandit.select() == winner
