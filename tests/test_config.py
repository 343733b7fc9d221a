"""Every knob: its bounds, its help, its errors."""

import dataclasses
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pulseopt_hf import AEES, PulseOptConfig

BAD: list[tuple[str, Any, str]] = [
    ("divergence", "undo", "one of 'off', 'cut', 'rollback', got 'undo'"),
    ("divergence_factor", 1.0, "number > 1, got 1.0"),
    ("calibration", "ladder", "one of 'auto', 'trust_region', 'off', got 'ladder'"),
    ("bandit", "ucb", "one of 'scaled_ucb', 'conservative_ucb', 'discounted_ucb', got 'ucb'"),
    ("reward", "ema", "one of 'slope', 'smoothed', got 'ema'"),
    ("lr_candidates", [], "at least one value"),
    ("lr_candidates", [1.0, 1.0], "different values, got [1.0, 1.0]"),
    ("lr_candidates", [0.5, 0.0], "numbers > 0, got 0.0"),
    ("lr_candidates", [-1.0], "numbers > 0, got -1.0"),
    ("lr_candidates", [math.nan], "numbers > 0, got nan"),
    ("lr_candidates", [math.inf], "numbers > 0, got inf"),
    ("lr_candidates", ["2"], "numbers > 0, got '2'"),
    ("lr_candidates", "0.5", "a list of numbers > 0, got '0.5'"),
    ("lr_candidates", 1.0, "a list of numbers > 0, got 1.0"),
    ("lr_candidates", [True], "numbers > 0, got True"),
    ("noise_candidates", [], "at least one value"),
    ("noise_candidates", [0.0, 0.0], "different values"),
    ("noise_candidates", [-0.1], "numbers >= 0, got -0.1"),
    ("noise_candidates", [math.nan], "numbers >= 0, got nan"),
    ("noise_mode", "both", "one of 'absolute', 'relative', got 'both'"),
    ("episode_length", 0, "at least 1, got 0"),
    ("episode_length", -3, "at least 1, got -3"),
    ("episode_length", 2.5, "a whole number >= 1, got 2.5"),
    ("episode_length", True, "a whole number >= 1, got True"),
    ("control_mode", "greedy", "one of 'adaptive', 'random', got 'greedy'"),
    ("structured_control_mode", "x", "one of 'independent', 'conditional', got 'x'"),
    ("context_mode", None, "one of 'none', 'trend', got None"),
    ("context_trend_window", 0, "at least 1, got 0"),
    ("context_trend_window", 1025, "at most 1024, got 1025"),
    ("context_trend_epsilon", -1.0, ">= 0, got -1.0"),
    ("reward_instability_lambda", -0.1, ">= 0, got -0.1"),
    ("reward_epsilon", 0.0, "> 0, got 0.0"),
    ("reward_clip_min", 1.0, "below `reward_clip_max`, got 1.0 and 1.0"),
    ("reward_clip_min", math.nan, "finite, got nan"),
    ("reward_clip_max", -2.0, "below `reward_clip_max`, got -1.0 and -2.0"),
    ("ema_alpha", 0.0, "in (0, 1], got 0.0"),
    ("ema_alpha", 1.1, "in (0, 1], got 1.1"),
    ("nonfinite", "ignore", "one of 'skip', 'raise', got 'ignore'"),
    ("max_consecutive_skips", 0, "at least 1, got 0"),
    ("log_update_norm", "yes", "True or False, got 'yes'"),
    ("seed", -1, "at least 0, got -1"),
    ("seed", 0.5, "a whole number >= 0, got 0.5"),
]


@pytest.mark.parametrize(("knob", "value", "message"), BAD)
def test_a_bad_value_raises_one_clear_error(knob: str, value: Any, message: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="`") as config_error:
        PulseOptConfig(**{knob: value})
    with pytest.raises(ValueError, match="`") as aees_error:
        AEES(optimizer, **{knob: value})
    text = str(config_error.value)
    assert f"`{knob}`" in text
    assert message in text
    assert "\n" not in text
    assert str(aees_error.value) == text


def test_every_knob_has_a_test_of_its_bounds_and_a_help_text() -> None:
    fields = dataclasses.fields(PulseOptConfig)
    assert {field.name for field in fields} == {knob for knob, _, _ in BAD}
    assert all(len(field.metadata["help"]) > 20 for field in fields)
    assert all(set(field.metadata) == {"help"} for field in fields)


def test_aees_takes_every_knob_and_says_what_it_does() -> None:
    """In its signature, with the published defaults, and in its docstring, with the knob's help."""
    parameters = inspect.signature(AEES).parameters
    published = PulseOptConfig.published(nonfinite="raise")
    said = " ".join(str(AEES.__doc__).split())
    for field in dataclasses.fields(PulseOptConfig):
        assert parameters[field.name].default == getattr(published, field.name)
        assert f"{field.name}: {field.metadata['help']} Default: " in said
    assert next(iter(parameters)) == "optimizer"
    assert "knobs" not in parameters
    with pytest.raises(TypeError, match="lr_candidate'"):
        AEES(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), lr_candidate=[1.0])


def test_all_errors_of_a_config_come_at_once() -> None:
    with pytest.raises(ValueError, match="`ema_alpha`") as error:
        PulseOptConfig(ema_alpha=2.0, episode_length=0, context_mode="x")
    assert len(str(error.value).splitlines()) == 3


def test_the_episode_length_has_to_be_set_for_a_loop_of_ones_own() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="`episode_length` must be a whole number >= 1 here"):
        AEES(optimizer, episode_length=None)


def test_numbers_of_other_kinds_become_floats() -> None:
    config = PulseOptConfig(lr_candidates=(1, np.float32(0.5)), noise_candidates=(0,))
    assert config.lr_candidates == [1.0, 0.5]
    assert all(type(value) is float for value in config.lr_candidates + config.noise_candidates)


@given(steps=st.integers(1, 10**7), candidates=st.integers(1, 9), seed=st.integers(0, 10))
def test_a_config_for_a_run_is_always_one_that_the_run_can_hold(steps, candidates, seed):
    config = PulseOptConfig(lr_candidates=[float(i + 1) for i in range(candidates)])
    filled = config.for_run(steps, seed)
    assert 1 <= filled.episode_length <= steps
    assert filled.seed == seed
