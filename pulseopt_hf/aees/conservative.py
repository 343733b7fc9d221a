"""A bandit that rests on one arm until another one is shown to be better. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pulseopt_hf.aees.bandits import DISCOUNT, MEAN_DISCOUNT, Bandit
from pulseopt_hf.aees.json_checks import (
    StateDict,
    StateError,
    field,
    integer,
    list_of,
    number,
    optional,
)

FIRST_PLAYS = 6  # of the baseline, before another arm has anything to be compared with
EVERY = 4  # episodes, of which one tries another arm
FEWEST_PLAYS = 2  # of another arm, without which nothing is shown
LEAST_COUNT = 1e-300  # that a count is taken for, once discounts have left next to nothing


class ConservativeUCB(Bandit):
    """Plays the baseline, the arm that changes nothing, unless another one is shown to be better.

    Every fourth episode at most tries another arm: each one twice, then the one with the largest
    mean reward plus its standard error. An arm that leads the baseline by more than its error is
    played from then on, for as long as it does, and one that trails by as much is not tried again.
    All is discounted as in `DiscountedUCB`. The idea of exploring beside a baseline is that of Wu,
    Shariff, Lattimore and Szepesvari, "Conservative Bandits", 2016, arXiv 1602.04282.

    A lower LR shows a lower loss at once, since the weights scatter less, and a higher LR a higher
    one; all of that is lost again on the way back (short-horizon bias: Wu et al., 2018, arXiv
    1803.02021). So an arm is credited with the episode after it, too, when the baseline is back.
    """

    kind = "conservative_ucb"

    def __init__(self, arms: int, seed: int | None, baseline: int = 0) -> None:
        super().__init__(arms, seed, baseline)
        self.plays = [0] * arms
        self.counts = [0.0] * arms
        self.sums = [0.0] * arms  # of rewards less the baseline's running mean
        self.squares = 0.0  # of the baseline's rewards, less that mean
        self.mean = 0.0  # running mean of the baseline's rewards
        self._weight = 0.0  # of that mean
        self._since = 0  # episodes since another arm was played
        self._previous: int | None = None  # arm of the episode before

    def select(self, context: str | None = None, playable: Sequence[int] | None = None) -> int:
        if self.plays[self.baseline] < FIRST_PLAYS:
            return self.baseline
        allowed = range(self.arms) if playable is None else playable
        others = [arm for arm in allowed if arm != self.baseline]
        leads = {arm: self.lead(arm) for arm in others if self.plays[arm] >= FEWEST_PLAYS}
        shown = [arm for arm, (lead, error) in leads.items() if lead > error]
        if shown:
            return max(shown, key=lambda arm: leads[arm][0])
        unknown = [arm for arm in others if arm not in leads]
        possible = [arm for arm, (lead, error) in leads.items() if lead > -error]
        if self._since < EVERY - 1 or not (unknown or possible):
            return self.baseline
        if unknown:
            fewest = min(self.plays[arm] for arm in unknown)
            return self._rng.choice([arm for arm in unknown if self.plays[arm] == fewest])
        return max(possible, key=lambda arm: sum(leads[arm]))

    def lead(self, arm: int) -> tuple[float, float]:
        """Return how far an arm's mean reward lies above the baseline's, and the standard error.

        Args:
            arm: index of an arm that was played, and not the baseline, which was played too.
        """
        count, base = (max(self.counts[one], LEAST_COUNT) for one in (arm, self.baseline))
        variance = self.squares / max(base - 1.0, 0.5)
        # The reward of an arm is that of two episodes.
        return self.sums[arm] / count, math.sqrt(variance * (2.0 / count + 1.0 / base))

    def update(self, arm: int, reward: float, context: str | None = None) -> None:
        previous, self._previous = self._previous, arm
        self._since = self._since + 1 if arm == self.baseline else 0
        self.plays[arm] += 1
        centred = reward - self.mean if self._weight > 0.0 else 0.0
        if arm == self.baseline and previous not in (None, self.baseline):
            self.sums[previous] += centred
            return
        self.counts = [DISCOUNT * count for count in self.counts]
        self.sums = [DISCOUNT * total for total in self.sums]
        self.counts[arm] += 1.0
        if arm != self.baseline:
            self.sums[arm] += centred
            return
        self.squares = DISCOUNT * self.squares + centred * centred
        self._weight = MEAN_DISCOUNT * self._weight + 1.0
        self.mean += (reward - self.mean) / self._weight

    def state_dict(self) -> StateDict:
        return {
            **super().state_dict(),
            "plays": list(self.plays),
            "counts": list(self.counts),
            "sums": list(self.sums),
            "squares": self.squares,
            "mean": self.mean,
            "weight": self._weight,
            "since": self._since,
            "previous": self._previous,
        }

    def load_state_dict(self, state: object) -> None:
        plays = field(state, "plays", list_of(integer, self.arms))
        counts = field(state, "counts", list_of(number, self.arms))
        sums = field(state, "sums", list_of(number, self.arms))
        squares, weight = field(state, "squares", number), field(state, "weight", number)
        mean = field(state, "mean", number)
        since = field(state, "since", integer)
        previous = field(state, "previous", optional(integer))
        if squares < 0.0 or weight < 0.0 or min(counts) < 0.0:
            raise StateError("`counts`, `squares` and `weight` must not be negative.")
        if previous is not None and previous >= self.arms:
            raise StateError(f"`previous` is {previous}, which names no arm.")
        super().load_state_dict(state)
        self.plays, self.counts, self.sums = plays, counts, sums
        self.squares, self.mean, self._weight = squares, mean, weight
        self._since, self._previous = since, previous
