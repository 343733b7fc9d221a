"""The reward of an episode. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reward:
    """One episode's score with its parts, all dimensionless but the EMA ends.

    Attributes:
        value: the score that the bandits receive: `unclipped` within the clip bounds.
        unclipped: `base - penalty`.
        base: ln(ema_start + eps) - ln(ema_end + eps).
        instability: Var(l) / (mean(l)^2 + eps), population variance.
        penalty: lambda * instability.
        ema_start: first value of the smoothed loss, in the unit of the loss.
        ema_end: last value of the smoothed loss, in the unit of the loss.
    """

    value: float
    unclipped: float
    base: float
    instability: float
    penalty: float
    ema_start: float
    ema_end: float


def episode_reward(
    losses: Sequence[float],
    *,
    ema_alpha: float,
    instability_lambda: float,
    epsilon: float,
    clip_min: float,
    clip_max: float,
) -> Reward:
    """Score one episode by how far its smoothed loss fell.

    With e_1 = l_1 and e_k = a * l_k + (1 - a) * e_(k-1) over the losses l_1 .. l_n:

        reward = clip(ln(e_1 + eps) - ln(e_n + eps) - lambda * Var(l) / (mean(l)^2 + eps))

    This is the reward of AEES as published in the PyPI package `pulseopt` 0.3.0.

    Args:
        losses: step losses of the episode in order, shape (n,), n >= 1, all finite.
        ema_alpha: weight `a` of the newest loss, in (0, 1].
        instability_lambda: weight of the variance penalty, >= 0.
        epsilon: `eps`, > 0, in the unit of the loss.
        clip_min: lowest reward.
        clip_max: highest reward.

    Returns:
        The reward with its parts.

    Raises:
        ValueError: there is no loss, a loss is not finite, or the smoothed loss plus `epsilon` is
            not positive, which has no logarithm.
    """
    if not losses:
        raise ValueError("An episode needs at least one loss to be rewarded.")
    ema = losses[0]
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise ValueError(f"Losses must be finite, got {loss} at position {index}.")
        if index:
            ema = ema_alpha * loss + (1.0 - ema_alpha) * ema
    start, end = losses[0], ema
    if start + epsilon <= 0.0 or end + epsilon <= 0.0:
        raise ValueError(
            "The reward is a difference of logarithms and needs a positive loss, got a smoothed "
            f"loss of {start} at the start and {end} at the end of the episode. Add a constant to "
            "the loss, or choose `reward_epsilon` larger than its lowest value."
        )
    mean = sum(losses) / len(losses)
    variance = sum((loss - mean) ** 2 for loss in losses) / len(losses)
    base = math.log(start + epsilon) - math.log(end + epsilon)
    instability = variance / (mean * mean + epsilon)
    penalty = instability_lambda * instability
    unclipped = base - penalty
    return Reward(
        value=max(clip_min, min(clip_max, unclipped)),
        unclipped=unclipped,
        base=base,
        instability=instability,
        penalty=penalty,
        ema_start=start,
        ema_end=end,
    )
