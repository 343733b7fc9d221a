"""The reward of an episode. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reward:
    """One episode's score with its parts, all dimensionless but the EMA ends.

    Attributes:
        ema_start: first value of the smoothed loss, in the unit of the loss.
        ema_end: last value of the smoothed loss, in the unit of the loss.
        reward_base: how far the logarithm of the loss fell, see `episode_reward`.
        reward_instability: Var(l) / (mean(l)^2 + eps), population variance.
        reward_penalty: lambda * instability.
        reward_unclipped: `reward_base - reward_penalty`.
        reward: what the bandits receive: `reward_unclipped` within the clip bounds.
    """

    ema_start: float
    ema_end: float
    reward_base: float
    reward_instability: float
    reward_penalty: float
    reward_unclipped: float
    reward: float


def episode_reward(
    losses: Sequence[float],
    *,
    kind: str = "smoothed",
    ema_alpha: float,
    instability_lambda: float,
    epsilon: float,
    clip_min: float,
    clip_max: float,
) -> Reward:
    """Score one episode by how far its loss fell.

    With step losses l_1 .. l_n, of which e_1 = l_1 and e_k = a * l_k + (1 - a) * e_(k-1) are the
    smoothed ones:

        reward = clip(base - lambda * Var(l) / (mean(l)^2 + eps))

    Of kind `smoothed`, which is AEES as published in the PyPI package `pulseopt` 0.3.0,

        base = ln(e_1 + eps) - ln(e_n + eps)

    whose noise is that of l_1, however long the episode. Of kind `slope`, with the slope b of the
    straight line that fits the points (k, l_k) best in the least squares,

        base = -b * (n - 1) / (mean(|l|) + eps)

    whose noise is that of a single loss times sqrt(12 / n), for large n. Losses may have any sign;
    the variance is a share of mean(|l|)^2 then, too.

    Args:
        losses: step losses of the episode in order, shape (n,), n >= 1, all finite.
        kind: `smoothed` or `slope`.
        ema_alpha: weight `a` of the newest loss, in (0, 1].
        instability_lambda: weight of the variance penalty, >= 0.
        epsilon: `eps`, > 0, in the unit of the loss.
        clip_min: lowest reward.
        clip_max: highest reward.

    Returns:
        The reward with its parts.

    Raises:
        ValueError: there is no loss, a loss is not finite, the smoothed loss that `smoothed` takes
            the logarithm of is not positive with `epsilon` added, or `kind` is neither.
    """
    if not losses:
        raise ValueError("An episode needs at least one loss to be rewarded.")
    ema = losses[0]
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise ValueError(f"Losses must be finite, got {loss} at position {index}.")
        if index:
            ema = ema_alpha * loss + (1.0 - ema_alpha) * ema
    mean = sum(losses) / len(losses)
    variance = sum((loss - mean) ** 2 for loss in losses) / len(losses)
    if kind == "smoothed":
        start, end = _positive(losses[0], epsilon), _positive(ema, epsilon)
        base = math.log(start) - math.log(end)
    elif kind == "slope":
        mean = sum(map(abs, losses)) / len(losses)
        base = _fall(losses) / (mean + epsilon)
    else:
        raise ValueError(f"`kind` must be 'smoothed' or 'slope', got {kind!r}.")
    instability = variance / (mean * mean + epsilon)
    penalty = instability_lambda * instability
    unclipped = base - penalty
    return Reward(
        ema_start=losses[0],
        ema_end=ema,
        reward_base=base,
        reward_instability=instability,
        reward_penalty=penalty,
        reward_unclipped=unclipped,
        reward=max(clip_min, min(clip_max, unclipped)),
    )


def _positive(loss: float, epsilon: float) -> float:
    if loss + epsilon <= 0.0:
        raise ValueError(
            f"The published reward takes the logarithm of the loss and needs a positive one, got "
            f"{loss}. Choose `reward='slope'`, or `reward_epsilon` larger than the lowest loss."
        )
    return loss + epsilon


def _fall(losses: Sequence[float]) -> float:
    """Return how far the straight line falls that fits the losses best in the least squares."""
    last = len(losses) - 1
    weights = [index - last / 2 for index in range(len(losses))]
    spread = sum(weight * weight for weight in weights)
    if spread == 0.0:
        return 0.0  # a single loss
    return -last * sum(w * loss for w, loss in zip(weights, losses, strict=True)) / spread
