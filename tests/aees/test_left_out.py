"""Which records of a long run are kept, and the totals of the others."""

import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulseopt_hf import PulseOptConfig
from pulseopt_hf.aees import Controller
from pulseopt_hf.aees.left_out import MOST, NEWEST, kept_numbers, sum_up
from tests.conftest import ARMS


def test_a_run_of_ordinary_length_keeps_everything() -> None:
    for count in (0, 1, NEWEST, MOST, MOST + NEWEST - 1):
        assert kept_numbers(count) == list(range(1, count + 1))
    assert len(kept_numbers(MOST + NEWEST)) < MOST + NEWEST


@given(st.integers(MOST + NEWEST, 2**64), st.integers(0, 10 * MOST))
def test_a_long_one_keeps_a_bounded_number_and_the_newest(count: int, more: int) -> None:
    kept = kept_numbers(count)
    assert len(kept) < MOST + 2 * NEWEST
    assert kept[-NEWEST:] == list(range(count - NEWEST + 1, count + 1))
    # What is kept of the beginning is spread evenly, and no coarser than it has to be.
    old = kept[: MOST // 4]
    (stride,) = {later - earlier for earlier, later in pairwise(old)}
    assert old[0] == 1
    assert (count - 2 * NEWEST) / stride > MOST / 2 - NEWEST
    # What was left out once is not asked for later.
    assert {number for number in kept_numbers(count + more) if number <= count} <= set(kept)


def test_totals_are_those_of_all_episodes() -> None:
    """6,000 of them, of which some are left out; two arms of the six are undone at times."""
    config = PulseOptConfig(**ARMS, episode_length=2, seed=0)
    controller, everything = Controller(config), []
    for index in range(6_000):
        arm = controller.open(controller.choose(), 2 * index)
        losses = [2.0, 1.0 + (index * 37 % 101) / 100 * arm.lr_multiplier]
        outcome = "cut" if arm.lr_multiplier == 2.0 and index % 7 == 0 else None
        everything.append(controller.close(losses, 2 * index + 1, outcome=outcome))
    assert controller.closed == 6_000
    assert len(controller.records) == len(kept_numbers(6_000)) < 6_000
    assert [number for number, _ in controller.since(0)] == kept_numbers(6_000)
    assert controller.since(5_998) == [(5_999, everything[-2]), (6_000, everything[-1])]
    assert [everything[number - 1] for number in kept_numbers(6_000)] == controller.records
    totals = controller.totals()
    assert len(totals) == 6
    assert sum(arm.outcomes.get("cut", 0) for arm in totals) == sum(
        record.outcome is not None for record in everything
    )
    for arm, plain in zip(totals, sum_up(everything), strict=True):
        own = [
            record
            for record in everything
            if (record.lr_value, record.noise_value) == (arm.lr_multiplier, arm.noise_std)
        ]
        rewards = [record.reward for record in own]
        assert arm.plays == len(own) == plain.plays > 0
        assert arm.steps == 2 * len(own)
        assert arm.outcomes == plain.outcomes
        assert (arm.lowest, arm.highest) == (min(rewards), max(rewards))
        for found in (arm, plain):
            assert found.mean == pytest.approx(statistics.fmean(rewards))
            assert found.spread == pytest.approx(statistics.stdev(rewards))
