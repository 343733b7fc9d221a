"""The record of closed episodes, and the logs made from it. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pulseopt_hf.aees.json_checks import StateDict, StateError, checks_of, field, list_of
from pulseopt_hf.aees.reward import Reward


@dataclass(frozen=True)
class EpisodeRecord(Reward):
    """One closed episode and its reward. Losses are in the unit of the training loss.

    Attributes:
        lr_index: index of the arm's LR multiplier among `lr_candidates`.
        noise_index: index of its noise level among `noise_candidates`.
        lr_value: the LR multiplier.
        noise_value: the noise level.
        name: the arm's name.
        start_step: global step of its first optimizer step.
        end_step: global step of its last optimizer step.
        start_loss: first step loss.
        end_loss: last step loss.
        update_norm: mean L2 norm of the parameters' change in a step; `None` if not measured.
        context: trend of the loss when the arm was chosen; `None` without a context.
        outcome: what the divergence guard did to it; `None` for a sound episode.
        learning_rate: effective LR of its last step; `None` if unknown.
    """

    lr_index: int
    noise_index: int
    lr_value: float
    noise_value: float
    name: str
    start_step: int
    end_step: int
    start_loss: float
    end_loss: float
    update_norm: float | None
    context: str | None
    outcome: str | None = None
    learning_rate: float | None = None


# The published log keys, in their published order, and the attribute that each one lists.
_ATTRIBUTE_OF_KEY = {
    "selected_lr_indices": "lr_index",
    "selected_noise_indices": "noise_index",
    "selected_lr_values": "lr_value",
    "selected_noise_values": "noise_value",
    "selected_combined_names": "name",
    "episode_rewards": "reward",
    "episode_start_steps": "start_step",
    "episode_end_steps": "end_step",
    "episode_start_losses": "start_loss",
    "episode_end_losses": "end_loss",
    "episode_ema_loss_starts": "ema_start",
    "episode_ema_loss_ends": "ema_end",
    "reward_base": "reward_base",
    "reward_instability": "reward_instability",
    "reward_penalty": "reward_penalty",
    "reward_final_unclipped": "reward_unclipped",
    "reward_final_clipped": "reward",
    "mean_update_norms": "update_norm",
}
_CONTEXT_KEY = "context_buckets"
_OUTCOME_KEY = "episode_outcomes"
LOG_KEYS = (*_ATTRIBUTE_OF_KEY, _CONTEXT_KEY)


def to_logs(
    records: Sequence[EpisodeRecord], *, with_context: bool, with_outcome: bool = False
) -> dict[str, list[Any]]:
    """Turn the record into lists, one item an episode, under the log keys of `pulseopt`.

    Args:
        records: closed episodes, oldest first.
        with_context: whether a context is in use, which adds `context_buckets`.
        with_outcome: whether the divergence guard is, which adds `episode_outcomes`.
    """
    logs: dict[str, list[Any]] = {
        key: [getattr(record, attribute) for record in records]
        for key, attribute in _ATTRIBUTE_OF_KEY.items()
    }
    if with_context:
        logs[_CONTEXT_KEY] = [record.context for record in records]
    if with_outcome:
        logs[_OUTCOME_KEY] = [record.outcome for record in records]
    return logs


def records_to_json(records: Sequence[EpisodeRecord]) -> StateDict:
    """Return the record as columns, which are a third of the size of rows."""
    return {
        name: [getattr(record, name) for record in records]
        for name in EpisodeRecord.__dataclass_fields__
    }


def records_from_json(value: object, name: str) -> list[EpisodeRecord]:
    """Rebuild what `records_to_json` returned."""
    columns = {
        column: field(value, column, list_of(check))
        for column, check in checks_of(EpisodeRecord).items()
    }
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise StateError(f"The columns of `{name}` differ in length: {sorted(lengths)}.")
    return [EpisodeRecord(*row) for row in zip(*columns.values(), strict=True)]
