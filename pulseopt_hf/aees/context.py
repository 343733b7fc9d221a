"""The trend context: one bandit for each way the loss can be going. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pulseopt_hf.aees.bandits import Bandit, BanditFactory, DiscountedUCB
from pulseopt_hf.aees.json_checks import StateDict, StateError, field, shorten

BUCKETS = ("improving", "stable", "worsening")


def loss_trend(episode_end_losses: Sequence[float], *, window: int, epsilon: float) -> str:
    """Name the way the loss is going.

    Args:
        episode_end_losses: last step loss of every closed episode, oldest first.
        window: how many of the last ones to look at, >= 1.
        epsilon: mean step, in the unit of the loss, that still counts as no change, >= 0.

    Returns:
        `improving` or `worsening` where the mean step between the last `window` losses is below
        `-epsilon` or above `epsilon`; else, and with fewer than two losses, `stable`.
    """
    recent = list(episode_end_losses[-window:])
    if len(recent) < 2:
        return "stable"
    steps = [later - earlier for earlier, later in pairwise(recent)]
    mean_step = sum(steps) / len(steps)
    if mean_step < -epsilon:
        return "improving"
    if mean_step > epsilon:
        return "worsening"
    return "stable"


class TrendBandit(Bandit):
    """Wraps a bandit so that each trend of the loss has one of its own.

    A bucket's bandit is made when its trend is first met. It starts from what a global bandit,
    which sees every update, has learned by then, and is seeded `seed + 1000 + index of the
    bucket`. From then on it learns only from episodes chosen under its trend.

    Args:
        arms: number of arms, >= 1.
        seed: see `Bandit`.
        bandit: the class that is wrapped.
    """

    kind = "trend"

    def __init__(
        self,
        arms: int,
        seed: int | None,
        baseline: int = 0,
        bandit: BanditFactory = DiscountedUCB,
    ) -> None:
        super().__init__(arms, seed, baseline)
        self._seed = seed
        self._make = bandit
        self._global = bandit(arms, seed, baseline)
        self._buckets: dict[str, Bandit] = {}

    def select(self, context: str | None = None, playable: Sequence[int] | None = None) -> int:
        return self._bucket(context).select(playable=playable)

    def update(self, arm: int, reward: float, context: str | None = None) -> None:
        bucket = self._bucket(context)
        self._global.update(arm, reward)
        bucket.update(arm, reward)

    def _bucket(self, context: str | None) -> Bandit:
        if context not in BUCKETS:
            raise ValueError(f"`context` must be one of {', '.join(BUCKETS)}, got {context!r}.")
        if context not in self._buckets:
            bucket = self._new_bucket(context)
            bucket.adopt(self._global)
            self._buckets[context] = bucket
        return self._buckets[context]

    def _new_bucket(self, context: str) -> Bandit:
        seed = None if self._seed is None else self._seed + 1000 + BUCKETS.index(context)
        return self._make(self.arms, seed, self.baseline)

    def state_dict(self) -> StateDict:
        return {
            **super().state_dict(),
            "global": self._global.state_dict(),
            "buckets": {name: bandit.state_dict() for name, bandit in self._buckets.items()},
        }

    def load_state_dict(self, state: object) -> None:
        saved = field(state, "buckets", _bucket_states)
        new_global = self._make(self.arms, None, self.baseline)
        new_global.load_state_dict(field(state, "global", lambda value, name: value))
        new_buckets = {name: self._new_bucket(name) for name in saved}
        for name, bucket in new_buckets.items():
            bucket.load_state_dict(saved[name])
        super().load_state_dict(state)
        self._global, self._buckets = new_global, new_buckets


def _bucket_states(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict) or not set(value) <= set(BUCKETS):
        raise StateError(f"`{name}` must map names of trends to states, got {shorten(value)}.")
    return value
