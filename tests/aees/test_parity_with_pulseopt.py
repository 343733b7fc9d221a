"""The method equals the PyPI package `pulseopt` 0.3.0, which is used as a black box."""

import itertools
import random
from typing import Any

import pytest
import torch
from pulseopt import AEES as PublishedAEES

from pulseopt_hf import PulseOptConfig
from pulseopt_hf.aees import LOG_KEYS, Controller

LR_CANDIDATES = [0.5, 1.0, 2.0, 1e-5]
NOISE_CANDIDATES = [0.0, 0.005, 0.1]
EPISODE_LENGTH = 4
STEPS = 90  # the last episode is a partial one
SEEDS = 20


def losses_of(seed: int) -> list[float]:
    """Return losses that fall, rise or only vary, with the noise of mini-batches."""
    rng = random.Random(seed)
    trend = (0.98, 1.01, 1.0)[seed % 3]
    return [3.0 * trend**step * (1.0 + 0.3 * rng.random()) for step in range(STEPS)]


def published_logs(losses: list[float], **knobs: Any) -> dict[str, list[Any]]:
    parameter = torch.nn.Parameter(torch.ones(1))
    aees = PublishedAEES(torch.optim.SGD([parameter], lr=0.1), **knobs)
    for step, loss in enumerate(losses):
        aees.step_start(step)
        parameter.grad = torch.zeros(1)
        aees.step_end(loss)
    aees.finalize()
    return aees.get_logs()


def our_logs(losses: list[float], **knobs: Any) -> dict[str, list[Any]]:
    controller = Controller(PulseOptConfig.published(**knobs))
    episode: list[float] = []
    for step, loss in enumerate(losses):
        if controller.episode is None:
            controller.open(controller.choose(), step)
        episode.append(loss)
        if len(episode) == knobs["episode_length"] or step == len(losses) - 1:
            controller.close(episode, step)
            episode = []
    return controller.logs()


@pytest.mark.parametrize("control_mode", ["adaptive", "random"])
@pytest.mark.parametrize("structured_control_mode", ["independent", "conditional"])
@pytest.mark.parametrize("context_mode", ["none", "trend"])
def test_arms_rewards_and_logs_equal_those_of_pulseopt(
    control_mode: str, structured_control_mode: str, context_mode: str
) -> None:
    for lr_count, noise_count, seed in itertools.product(range(1, 5), range(1, 4), range(SEEDS)):
        knobs = {
            "lr_candidates": LR_CANDIDATES[:lr_count],
            "noise_candidates": NOISE_CANDIDATES[:noise_count],
            "episode_length": EPISODE_LENGTH,
            "control_mode": control_mode,
            "structured_control_mode": structured_control_mode,
            "context_mode": context_mode,
            "context_trend_window": 2 + seed % 4,
            "context_trend_epsilon": 10.0 ** -(seed % 5),
            "reward_instability_lambda": 0.5 * (seed % 3),
            "reward_clip_min": -0.1,
            "reward_clip_max": 0.05,
            "ema_alpha": 0.05 + 0.19 * (seed % 6),
            "seed": seed,
        }
        losses = losses_of(seed)
        published, ours = published_logs(losses, **knobs), our_logs(losses, **knobs)
        published.pop("mean_update_norms")  # compared in tests/optim, on parameters that move
        ours.pop("mean_update_norms")
        assert ours == published, knobs


def test_the_log_keys_are_those_of_pulseopt_in_their_order() -> None:
    knobs = {"lr_candidates": [0.5, 1.0], "episode_length": 2, "context_mode": "trend", "seed": 0}
    assert tuple(published_logs([1.0, 2.0], **knobs)) == LOG_KEYS
    assert tuple(our_logs([1.0, 2.0], **knobs)) == LOG_KEYS


@pytest.mark.parametrize("value", [1e-5, 2.5e-7, 1 / 3, 0.1, 10.0, 123456789.0, 3])
def test_arm_names_are_those_of_pulseopt(value: float) -> None:
    knobs = {"lr_candidates": [value], "noise_candidates": [value], "episode_length": 1, "seed": 0}
    published = published_logs([1.0], **knobs)["selected_combined_names"]
    assert our_logs([1.0], **knobs)["selected_combined_names"] == published
