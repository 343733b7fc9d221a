"""What a run logs of its episodes: values beside Trainer's own, and a line for each."""

from __future__ import annotations

import logging

from pulseopt_hf.aees.record_format import NumberedEpisode, RunEvent
from pulseopt_hf.optim import AEES

logger = logging.getLogger("pulseopt_hf")


def log_values(aees: AEES) -> dict[str, float]:
    """Return the `pulse/*` values of the latest step, for Trainer's log.

    With one arm they are what can vary: the effective LR, unless every step is plain, and the
    skipped steps, once there are some.
    """
    values: dict[str, float] = {}
    if aees.config.arms > 1 or aees.skipped_steps:
        values["pulse/skipped_steps"] = aees.skipped_steps
    if aees.learning_rate is not None and not aees.is_plain:
        values["pulse/learning_rate"] = aees.learning_rate
        if aees.ramp < 1.0:
            values["learning_rate"] = aees.learning_rate
    if aees.config.arms == 1:
        return values
    records, episode = aees.controller.records, aees.controller.episode
    if episode is not None:
        values["pulse/episode"] = aees.controller.closed + 1
        values["pulse/lr_multiplier"] = episode.arm.lr_multiplier
        values["pulse/noise_std"] = episode.arm.noise_std
    elif records:
        values["pulse/episode"] = aees.controller.closed
        values["pulse/lr_multiplier"] = records[-1].lr_value
        values["pulse/noise_std"] = records[-1].noise_value
    if records:
        values["pulse/reward"] = records[-1].reward
    return values


def log_episode(event: RunEvent) -> None:
    """Log an episode that has ended, and warn of one that the divergence guard ended."""
    if not isinstance(event, NumberedEpisode):
        return
    number, record = event.number, event.record
    logger.info(
        "Episode %d: %s, loss %.4g to %.4g, reward %+.4f",
        number,
        record.name,
        record.ema_start,
        record.ema_end,
        record.reward,
    )
    if record.outcome is not None:
        end, outcome = record.end_step, record.outcome
        logger.warning(
            "Episode %d, %s, diverged at step %d and was %s.", number, record.name, end, outcome
        )
