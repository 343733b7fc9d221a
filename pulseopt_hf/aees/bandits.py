"""Bandits: each learns from rewards which of its arms to play. Standard library only."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

from pulseopt_hf.aees.json_checks import (
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
SCALED_EXPLORATION = 0.5  # the same of `ScaledUCB`, in standard deviations of the reward
FIRST_PLAYS = 2  # of every arm, without which `ScaledUCB` knows no spread
MEAN_DISCOUNT = 0.9  # of past rewards in the running mean over all arms
TIE = 1e-12  # scores this close count as equal

BanditFactory: TypeAlias = "Callable[[int, int | None, int], Bandit]"


class Bandit(ABC):
    """Chooses one of `arms` arms, and learns from the reward of each one played.

    A bandit knows nothing of learning rates or noise: an arm is its index. All of its randomness
    comes from its own generator, so two bandits with equal seeds and equal histories choose alike.
    """

    kind: str

    def __init__(self, arms: int, seed: int | None, baseline: int = 0) -> None:
        """Create a bandit that has seen nothing.

        Args:
            arms: number of arms, >= 1.
            seed: seed of its generator; `None` draws one from the operating system.
            baseline: index of the arm that changes least, for bandits that rest.
        """
        self.arms = arms
        self.baseline = baseline
        self._rng = random.Random(seed)

    @abstractmethod
    def select(self, context: str | None = None, playable: Sequence[int] | None = None) -> int:
        """Choose the arm of the next episode.

        Args:
            context: what the loss is doing, for bandits that use it; others ignore it.
            playable: arms beside the baseline that may be played now, for bandits that rest;
                others play any. `None` is all.

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

    def adopt(self, other: Bandit) -> None:
        """Start from what another bandit of this kind has learned, keeping one's own generator."""
        self.load_state_dict({**other.state_dict(), "rng": random_to_json(self._rng)})

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

    def __init__(self, arms: int, seed: int | None, baseline: int = 0) -> None:
        super().__init__(arms, seed, baseline)
        self.counts = [0.0] * arms
        self.sums = [0.0] * arms

    def select(self, context: str | None = None, playable: Sequence[int] | None = None) -> int:
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
        self.counts = [DISCOUNT * count for count in self.counts]
        self.sums = [DISCOUNT * total for total in self.sums]
        self.counts[arm] += 1.0
        self.sums[arm] += reward

    def state_dict(self) -> StateDict:
        return {**super().state_dict(), "counts": list(self.counts), "sums": list(self.sums)}

    def load_state_dict(self, state: object) -> None:
        counts = field(state, "counts", list_of(number, self.arms))
        sums = field(state, "sums", list_of(number, self.arms))
        if any(count < 0.0 for count in counts):
            raise StateError(f"`counts` must not be negative, got {shorten(counts)}.")
        super().load_state_dict(state)
        self.counts, self.sums = counts, sums


class ScaledUCB(Bandit):
    """Discounted UCB whose bonus is in the unit of the rewards, measured from their running mean.

    The published bonus is far larger than real rewards differ, so that it plays all arms alike.
    Here it is scaled by the spread of the rewards seen:

        argmax  S / N + c * sigma * sqrt(ln(sum N + 1) / N),   c = 0.5,

    with N and S discounted as in `DiscountedUCB`, and sigma^2 the discounted variance of rewards
    within arms, as in UCB-V (Audibert, Munos and Szepesvari, "Exploration-exploitation tradeoff
    using variance estimates in multi-armed bandits", 2009) but shared by all arms. S sums rewards
    less their running mean over all arms, since the loss falls more slowly as training goes on and
    whatever was played first would look better. Every arm is played twice before.
    """

    kind = "scaled_ucb"

    def __init__(self, arms: int, seed: int | None, baseline: int = 0) -> None:
        super().__init__(arms, seed, baseline)
        self.plays = [0] * arms
        self.counts = [0.0] * arms
        self.sums = [0.0] * arms
        self.squares = [0.0] * arms
        self.mean = 0.0  # running mean of rewards over all arms
        self._weight = 0.0  # of that mean

    def select(self, context: str | None = None, playable: Sequence[int] | None = None) -> int:
        fewest = min(self.plays)
        if fewest < FIRST_PLAYS:
            return self._rng.choice([arm for arm, n in enumerate(self.plays) if n == fewest])
        log_total = math.log(sum(self.counts) + 1.0)
        bonus = SCALED_EXPLORATION * self.spread()
        scores = [
            total / count + bonus * math.sqrt(log_total / count)
            for total, count in zip(self.sums, self.counts, strict=True)
        ]
        best = max(scores)
        return self._rng.choice([arm for arm, score in enumerate(scores) if best - score <= TIE])

    def spread(self) -> float:
        """Return the standard deviation of rewards within arms, dimensionless."""
        within = sum(
            max(square - total * total / count, 0.0)
            for square, total, count in zip(self.squares, self.sums, self.counts, strict=True)
            if count > 0.0
        )
        return math.sqrt(within / max(sum(self.counts) - self.arms, 0.5))

    def update(self, arm: int, reward: float, context: str | None = None) -> None:
        centred = reward - self.mean if self._weight > 0.0 else 0.0
        self._weight = MEAN_DISCOUNT * self._weight + 1.0
        self.mean += (reward - self.mean) / self._weight
        for values in (self.counts, self.sums, self.squares):
            for index in range(self.arms):
                values[index] *= DISCOUNT
        self.plays[arm] += 1
        self.counts[arm] += 1.0
        self.sums[arm] += centred
        self.squares[arm] += centred * centred

    def state_dict(self) -> StateDict:
        return {
            **super().state_dict(),
            "plays": list(self.plays),
            "counts": list(self.counts),
            "sums": list(self.sums),
            "squares": list(self.squares),
            "mean": self.mean,
            "weight": self._weight,
        }

    def load_state_dict(self, state: object) -> None:
        plays = field(state, "plays", list_of(integer, self.arms))
        numbers = [
            field(state, name, list_of(number, self.arms)) for name in ("counts", "sums", "squares")
        ]
        mean, weight = field(state, "mean", number), field(state, "weight", number)
        if weight < 0.0 or any(value < 0.0 for value in (*numbers[0], *numbers[2])):
            raise StateError("`counts`, `squares` and `weight` must not be negative.")
        if any(n > 0 and count == 0.0 for n, count in zip(plays, numbers[0], strict=True)):
            raise StateError("An arm that was played must have a count above 0.")
        super().load_state_dict(state)
        self.plays, (self.counts, self.sums, self.squares) = plays, numbers
        self.mean, self._weight = mean, weight


class RandomBandit(Bandit):
    """Plays every arm equally often and learns nothing: the control for any claim of a benefit."""

    kind = "random"

    def select(self, context: str | None = None, playable: Sequence[int] | None = None) -> int:
        return self._rng.randrange(self.arms)

    def update(self, arm: int, reward: float, context: str | None = None) -> None:
        """Learn nothing."""
