"""What the records of a long run leave out, and its sums. Standard library only.

All that is kept of a run is bounded: the episodes in memory and in a checkpoint, and the lines of
the run record. Which of them are kept follows from their number alone, so a resumed run keeps the
same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as attribute

from pulseopt_hf.aees.episode_record import EpisodeRecord
from pulseopt_hf.aees.json_checks import (
    StateError,
    dataclass_of,
    from_one,
    list_of,
    mapping,
    text,
)
from pulseopt_hf.config import LONGEST_TREND_WINDOW

# A saved state has to have been written with the same two.
MOST = 4096  # that are kept of those before the newest
NEWEST = LONGEST_TREND_WINDOW  # that are kept whatever came before; later choices look at these


def settled(count: int) -> int:
    """Return at which count it was last settled what is kept of the first `count` things."""
    return count - count % NEWEST


def kept_numbers(count: int) -> list[int]:
    """Return which of `count` things are kept, numbered from 1.

    Those are all of up to `MOST`. Of more, the newest `NEWEST` are, and of those before them every
    second, fourth or so on, at most `MOST`. That is settled only when `count` reaches a multiple of
    `NEWEST`, so up to `NEWEST` more are there; what is left out never comes back.
    """
    stride = 1
    while settled(count) > stride * MOST:
        stride *= 2
    old = max(0, settled(count) - NEWEST)
    return [*range(1, old + 1, stride), *range(old + 1, count + 1)]


@dataclass(frozen=True)
class ArmTotals:
    """How often an arm was played, for how many steps, and its rewards.

    Attributes:
        lr_multiplier: the LR multiplier.
        noise_std: the noise level.
        plays: number of episodes.
        steps: number of optimizer steps.
        mean: mean reward.
        squares: sum of the squared distances of the rewards from their mean.
        lowest: lowest reward.
        highest: highest reward.
        outcomes: episodes that the divergence guard ended, by what it did.
    """

    lr_multiplier: float
    noise_std: float
    plays: int = 0
    steps: int = 0
    mean: float = 0.0
    squares: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf
    outcomes: Mapping[str, int] = attribute(default_factory=dict)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the rewards, `None` for a single episode."""
        return math.sqrt(self.squares / (self.plays - 1)) if self.plays > 1 else None

    def plus(self, record: EpisodeRecord) -> ArmTotals:
        """Return the totals with one more episode (Welford's update of mean and variance)."""
        plays, distance = self.plays + 1, record.reward - self.mean
        mean = self.mean + distance / plays
        outcomes = dict(self.outcomes)
        if record.outcome is not None:
            outcomes[record.outcome] = outcomes.get(record.outcome, 0) + 1
        return ArmTotals(
            self.lr_multiplier,
            self.noise_std,
            plays,
            self.steps + record.end_step - record.start_step + 1,
            mean,
            self.squares + distance * (record.reward - mean),
            min(self.lowest, record.reward),
            max(self.highest, record.reward),
            outcomes,
        )


def sum_up(records: Iterable[EpisodeRecord], before: Iterable[ArmTotals] = ()) -> list[ArmTotals]:
    """Return the totals of each arm, lowest LR multiplier first.

    Args:
        records: episodes, oldest first.
        before: totals of other episodes, to be added to.
    """
    found = {(arm.lr_multiplier, arm.noise_std): arm for arm in before}
    for record in records:
        arm = (record.lr_value, record.noise_value)
        found[arm] = found.get(arm, ArmTotals(*arm)).plus(record)
    return [found[arm] for arm in sorted(found)]


def totals_from_json(value: object, name: str) -> list[ArmTotals]:
    """Rebuild the totals of each arm from a list of mappings of their attributes.

    Raises:
        StateError: an attribute is missing or of another type, or an arm is there twice.
    """
    totals = list_of(_arm_from_json)(value, name)
    if len(sum_up((), totals)) < len(totals):
        raise StateError(f"`{name}` has an arm twice.")
    return totals


def _arm_from_json(value: object, name: str) -> ArmTotals:
    return dataclass_of(ArmTotals, value, plays=from_one, outcomes=_outcomes)


def _outcomes(value: object, name: str) -> dict[str, int]:
    return {text(key, name): from_one(count, name) for key, count in mapping(value, name).items()}
