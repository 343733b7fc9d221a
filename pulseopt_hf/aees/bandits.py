"""Bandits: each learns from rewards which of its arms to play. Standard library only."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from pulseopt_hf.aees.state import (
    StateDict,
    StateError,
    field,
    integer,
    list_of,
    number,
    random_from_json,
    random_to_json,
    shorten,
    text,
)

DISCOUNT = 0.95  # of past plays and rewards, at every update
EXPLORATION = 1.0  # weight `c` of the confidence bonus
TIE = 1e-12  # scores this close count as equal

BanditFactory: TypeAlias = "Callable[[int, int | None], Bandit]"


class Bandit(ABC):
    """Chooses one of `arms` arms, and learns from the reward of each one played.

    A bandit knows nothing of learning rates or noise: an arm is its index. All of its randomness
    comes from its own generator, so two bandits with equal seeds and equal histories choose alike.
    """

    kind: str

    def __init__(self, arms: int, seed: int | None) -> None:
        """Create a bandit that has seen nothing.

        Args:
            arms: number of arms, >= 1.
            seed: seed of its generator; `None` draws one from the operating system.
        """
        self.arms = arms
        self._rng = random.Random(seed)

    @abstractmethod
    def select(self, context: str | None = None) -> int:
        """Choose the arm of the next episode.

        Args:
            context: what the loss is doing, for bandits that use it; others ignore it.

        Returns:
            Index of the arm, 0 <= index < `arms`.
        """

    @abstractmethod
    def update(self, arm: int, reward: float, context: str | None = None) -> None:
        """Learn from one episode.

        Args:
            arm: index of the arm that was played.
            reward: its reward, dimensionless, finite.
            context: the context in which `select` chose it.
        """

    def state_dict(self) -> StateDict:
        """Return all that later choices depend on, as JSON."""
        return {"kind": self.kind, "arms": self.arms, "rng": random_to_json(self._rng)}

    def load_state_dict(self, state: object) -> None:
        """Continue from `state_dict()`; the bandit is unchanged if this raises.

        Raises:
            StateError: the state is damaged or is another bandit's.
        """
        if field(state, "kind", text) != self.kind:
            found = shorten(field(state, "kind", text))
            raise StateError(f"The saved bandit is of kind {found}, this one is {self.kind!r}.")
        if field(state, "arms", integer) != self.arms:
            raise StateError(
                f"The saved bandit has {field(state, 'arms', integer)} arms, this one {self.arms}."
            )
        self._rng = field(state, "rng", random_from_json)


class DiscountedUCB(Bandit):
    """Discounted UCB: the best recent mean reward, plus a bonus for what was seldom played.

    Every arm has a discounted count N and reward sum S. An update multiplies all of them by 0.95
    and adds 1 and the reward to those of the played arm. While some arm was never played, one of
    those is drawn at random; afterwards the choice is

        argmax  S / N + c * sqrt(ln(sum N + 1) / N),   c = 1,

    with ties broken at random. After Garivier and Moulines, "On Upper-Confidence Bound Policies
    for Non-Stationary Bandit Problems", 2008, arXiv 0805.3415; constants as in `pulseopt` 0.3.0.
    """

    kind = "discounted_ucb"

    def __init__(self, arms: int, seed: int | None) -> None:
        """See `Bandit`."""
        super().__init__(arms, seed)
        self.counts = [0.0] * arms
        self.sums = [0.0] * arms

    def select(self, context: str | None = None) -> int:
        """See `Bandit`."""
        unplayed = [arm for arm, count in enumerate(self.counts) if count == 0.0]
        if unplayed:
            return self._rng.choice(unplayed)
        log_total = math.log(sum(self.counts) + 1.0)
        scores = [
            total / count + EXPLORATION * math.sqrt(log_total / count)
            for total, count in zip(self.sums, self.counts, strict=True)
        ]
        best = max(scores)
        return self._rng.choice([arm for arm, score in enumerate(scores) if best - score <= TIE])

    def update(self, arm: int, reward: float, context: str | None = None) -> None:
        """See `Bandit`."""
        self.counts = [DISCOUNT * count for count in self.counts]
        self.sums = [DISCOUNT * total for total in self.sums]
        self.counts[arm] += 1.0
        self.sums[arm] += reward

    def adopt(self, other: DiscountedUCB) -> None:
        """Start from what another bandit has learned, keeping one's own generator."""
        self.counts = list(other.counts)
        self.sums = list(other.sums)

    def state_dict(self) -> StateDict:
        """See `Bandit`."""
        return {**super().state_dict(), "counts": list(self.counts), "sums": list(self.sums)}

    def load_state_dict(self, state: object) -> None:
        """See `Bandit`."""
        counts = field(state, "counts", list_of(number, self.arms))
        sums = field(state, "sums", list_of(number, self.arms))
        if any(count < 0.0 for count in counts):
            raise StateError(f"`counts` must not be negative, got {shorten(counts)}.")
        super().load_state_dict(state)
        self.counts, self.sums = counts, sums


class RandomBandit(Bandit):
    """Plays every arm equally often and learns nothing: the control for any claim of a benefit."""

    kind = "random"

    def select(self, context: str | None = None) -> int:
        """See `Bandit`."""
        return self._rng.randrange(self.arms)

    def update(self, arm: int, reward: float, context: str | None = None) -> None:
        """See `Bandit`."""
