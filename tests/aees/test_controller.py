"""The controller: seeds, state, and the order of calls."""

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulseopt_hf import PulseOptConfig
from pulseopt_hf.aees import Controller, StateError

KNOBS: dict[str, Any] = {"lr_candidates": [0.5, 1.0, 2.0], "episode_length": 10, "seed": 1}

knob_sets = st.fixed_dictionaries(
    {
        "lr_candidates": st.sampled_from([[1.0], [0.5, 2.0], [0.5, 1.0, 2.0]]),
        "noise_candidates": st.sampled_from([[0.0], [0.0, 0.01]]),
        "control_mode": st.sampled_from(["adaptive", "random"]),
        "structured_control_mode": st.sampled_from(["independent", "conditional"]),
        "context_mode": st.sampled_from(["none", "trend"]),
        "bandit": st.sampled_from(["conservative_ucb", "scaled_ucb", "discounted_ucb"]),
        "seed": st.integers(0, 2**32),
    }
)


def run(controller: Controller, episodes: int, losses: random.Random) -> None:
    for _ in range(episodes):
        if controller.episode is None:
            controller.open(controller.choose(), 10 * len(controller.records))
        controller.close([1.0 + losses.random() for _ in range(3)], 10 * len(controller.records))


@given(knobs=knob_sets, before=st.integers(0, 20), after=st.integers(1, 8), mid=st.booleans())
@settings(max_examples=100)
def test_a_restored_controller_goes_on_bit_for_bit(knobs, before, after, mid):
    config = PulseOptConfig(**{**KNOBS, **knobs})
    controller, losses = Controller(config), random.Random(0)
    run(controller, before, losses)
    if mid:
        controller.open(controller.choose(), 7)
    restored = Controller(config)
    restored.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert restored.state_dict() == controller.state_dict()
    tail = losses.getstate()
    run(controller, after, losses)
    losses.setstate(tail)
    run(restored, after, losses)
    assert restored.logs() == controller.logs()
    assert restored.state_dict() == controller.state_dict()


def test_knobs_that_only_watch_over_a_run_may_change() -> None:
    saved = Controller(PulseOptConfig(**KNOBS)).state_dict()
    config = PulseOptConfig(
        **KNOBS, nonfinite="raise", max_consecutive_skips=3, log_update_norm=True
    )
    Controller(config).load_state_dict(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": "1"}, "`version` must be a whole number"),
        ({"settings": None}, "mapping with `lr_candidates`"),
        ({"noise_bandits": [{}]}, "`noise_bandits` must have 0 items"),
        ({"lr_bandit": None}, "mapping with `plays`"),
        ({"episode": {"lr_index": 3, "noise_index": 0, "context": None}}, "names no candidate"),
        ({"records": {}}, "has no `ema_start`"),
        ({"rewards": [0.0]}, "differ in length"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change, message):
    controller = Controller(PulseOptConfig(**KNOBS))
    run(controller, 3, random.Random(0))
    before = controller.state_dict()
    if rewards := change.get("rewards"):
        change = {"records": {**before["records"], "reward": rewards}}
    with pytest.raises(StateError, match=message):
        controller.load_state_dict({**before, **change})
    assert controller.state_dict() == before


def test_calls_out_of_order_are_refused() -> None:
    controller = Controller(PulseOptConfig(**KNOBS))
    with pytest.raises(RuntimeError, match="No episode is open"):
        controller.close([1.0], 0)
    controller.open(controller.choose(), 0)
    with pytest.raises(RuntimeError, match="is open"):
        controller.open(controller.choose(), 1)


def test_an_axis_with_one_candidate_is_a_constant() -> None:
    controller = Controller(PulseOptConfig(lr_candidates=[3.0], episode_length=10, seed=1))
    run(controller, 5, random.Random(0))
    assert controller.logs()["selected_lr_values"] == [3.0] * 5
    assert controller.state_dict()["lr_bandit"] is None
    assert not controller.is_neutral
    assert Controller(PulseOptConfig(lr_candidates=[1.0], episode_length=1)).is_neutral


def played(controller: Controller, episodes: int, share: float, highest: float) -> set[float]:
    """Return the multipliers that are played where losses only scatter."""
    losses = random.Random(0)
    for _ in range(episodes):
        controller.open(controller.choose(share, highest), 0)
        controller.close([1.0 + losses.random() for _ in range(3)], 0)
    return {record.lr_value for record in controller.records}


def test_arms_rest_where_the_schedule_cools_down_and_stay_below_what_is_known_to_be_safe() -> None:
    config = PulseOptConfig(bandit="conservative_ucb", **KNOBS)
    assert played(Controller(config), 60, 1.0, math.inf) == {0.5, 1.0, 2.0}
    assert played(Controller(config), 60, 1.0, 1.0) == {0.5, 1.0}
    assert played(Controller(config), 60, 0.5, 1.0) == {0.5, 1.0, 2.0}
    assert played(Controller(config), 60, 0.19, 1.0) == {1.0}
    # The published bandit plays all arms at all times.
    published = PulseOptConfig.published(**KNOBS)
    assert played(Controller(published), 60, 0.1, 1.0) == {0.5, 1.0, 2.0}


def test_the_arm_that_arms_are_compared_with_is_the_one_that_changes_least() -> None:
    axes: dict[str, Any] = {"lr_candidates": [4.0, 0.8, 0.1], "noise_candidates": [0.2, 0.1]}
    controller = Controller(PulseOptConfig(bandit="conservative_ucb", episode_length=10, **axes))
    run(controller, 6, random.Random(0))
    assert {(record.lr_value, record.noise_value) for record in controller.records} == {(0.8, 0.1)}
