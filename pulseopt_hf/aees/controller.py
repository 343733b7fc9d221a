"""The controller: the bandits of both axes, the open episode, the record. Standard library only."""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pulseopt_hf.aees.arms import Arm
from pulseopt_hf.aees.bandits import (
    Bandit,
    BanditFactory,
    DiscountedUCB,
    RandomBandit,
    ScaledUCB,
)
from pulseopt_hf.aees.conservative import ConservativeUCB
from pulseopt_hf.aees.context import BUCKETS, TrendBandit, loss_trend
from pulseopt_hf.aees.episode_record import (
    EpisodeRecord,
    records_from_json,
    records_to_json,
    to_logs,
)
from pulseopt_hf.aees.json_checks import (
    StateDict,
    StateError,
    anything,
    field,
    integer,
    list_of,
    optional,
    shorten,
    text,
)
from pulseopt_hf.aees.left_out import (
    ArmTotals,
    kept_numbers,
    settled,
    sum_up,
    totals_from_json,
)
from pulseopt_hf.aees.reward import episode_reward
from pulseopt_hf.config import PulseOptConfig, method_settings

STATE_VERSION = 1
COOLING = 0.2  # share of the peak LR below which a schedule is about to end, and no arm is tried
BANDITS: dict[str, type[Bandit]] = {
    bandit.kind: bandit for bandit in (ConservativeUCB, ScaledUCB, DiscountedUCB)
}
_NOISE_SEED_OFFSET = 101


@dataclass(frozen=True)
class Selection:
    """The bandits' choice for one episode.

    Attributes:
        lr_index: index among `lr_candidates`.
        noise_index: index among `noise_candidates`.
        context: trend of the loss that the choice was made under, or `None` without a context.
    """

    lr_index: int
    noise_index: int
    context: str | None = None


@dataclass(frozen=True)
class OpenEpisode:
    """The episode that is running: its choice, its arm and the global step it began at."""

    selection: Selection
    arm: Arm
    start_step: int


class Controller:
    """Chooses the arm of each episode and learns from its losses.

    The loop that trains owns the time: it calls `choose` and `open` at the first step of an
    episode and `close` with the losses after the last.

    Args:
        config: the knobs. `seed=None` makes choices that cannot be repeated.

    Attributes:
        records: the closed episodes, oldest first; of very many, those that `kept_numbers` names.
        left_out: totals of the others.
    """

    def __init__(self, config: PulseOptConfig) -> None:
        self.config = config
        self.records: list[EpisodeRecord] = []
        self.left_out: list[ArmTotals] = []
        self.episode: OpenEpisode | None = None
        make = _bandit_factory(config)
        seed = config.seed
        noise_seed = None if seed is None else seed + _NOISE_SEED_OFFSET
        noise_bandits = 1
        if config.structured_control_mode == "conditional":
            noise_bandits = len(config.lr_candidates)
        # An axis with one candidate is a constant and has no bandit.
        self._lr_bandit: Bandit | None = None
        self._noise_bandits: list[Bandit] = []
        multipliers, levels = config.lr_candidates, config.noise_candidates
        if len(multipliers) > 1:
            plainest = min(range(len(multipliers)), key=lambda i: abs(math.log(multipliers[i])))
            self._lr_bandit = make(len(multipliers), seed, plainest)
        if len(levels) > 1:
            quietest = levels.index(min(levels))
            self._noise_bandits = [
                make(len(levels), None if noise_seed is None else noise_seed + i, quietest)
                for i in range(noise_bandits)
            ]

    @property
    def is_neutral(self) -> bool:
        """Whether every step is the plain optimizer step: one arm, with no effect."""
        return self.config.lr_candidates == [1.0] and self.config.noise_candidates == [0.0]

    @property
    def closed(self) -> int:
        """How many episodes were closed, those that are left out among them."""
        return len(self.records) + sum(arm.plays for arm in self.left_out)

    def since(self, number: int) -> list[tuple[int, EpisodeRecord]]:
        """Return the episodes after the first `number`, each with its number from 1."""
        closed = self.closed
        if number >= closed:
            return []
        numbers = kept_numbers(closed)
        start = bisect_right(numbers, number)
        return list(zip(numbers[start:], self.records[start:], strict=True))

    def totals(self) -> list[ArmTotals]:
        """Sum up all episodes by arm, lowest LR multiplier first."""
        return sum_up(self.records, self.left_out)

    def choose(self, share: float = 1.0, highest: float = math.inf) -> Selection:
        """Let the bandits choose the next arm. Draws from their generators.

        Args:
            share: the base LR as a share of its peak, >= 0. A bandit that rests does so where the
                schedule cools down.
            highest: share of the peak that no LR may exceed, for bandits that rest; a calibration
                has found how far a step may go.
        """
        context = None
        if self.config.context_mode == "trend":
            context = loss_trend(
                [record.end_loss for record in self.records[-self.config.context_trend_window :]],
                window=self.config.context_trend_window,
                epsilon=self.config.context_trend_epsilon,
            )
        lr_index = noise_index = 0
        is_cooling = share < COOLING
        if self._lr_bandit:
            multipliers = enumerate(self.config.lr_candidates)
            within = [i for i, factor in multipliers if factor * share <= highest * (1.0 + 1e-6)]
            lr_index = self._lr_bandit.select(context, [] if is_cooling else within)
        if noise_bandit := self._noise_bandit(lr_index):
            noise_index = noise_bandit.select(context, [] if is_cooling else None)
        return Selection(lr_index, noise_index, context)

    def open(self, selection: Selection, step: int) -> Arm:
        """Open an episode.

        Args:
            selection: the choice, this controller's or the one that all ranks agreed on.
            step: global step of its first optimizer step, >= 0.

        Raises:
            RuntimeError: an episode is open already.
        """
        if self.episode is not None:
            raise RuntimeError("An episode is open; close it before opening the next.")
        arm = Arm.of(
            self.config.lr_candidates[selection.lr_index],
            self.config.noise_candidates[selection.noise_index],
        )
        self.episode = OpenEpisode(selection, arm, step)
        return arm

    def close(
        self,
        losses: Sequence[float],
        end_step: int,
        update_norm: float | None = None,
        outcome: str | None = None,
        learning_rate: float | None = None,
    ) -> EpisodeRecord:
        """Close the open episode: reward it, tell the bandits, record it.

        Args:
            losses: its step losses, shape (n,), n >= 1, all finite.
            end_step: global step of its last optimizer step.
            update_norm: mean L2 norm of the parameters' change in a step, where measured.
            outcome: what the divergence guard did; the reward is the lowest then.
            learning_rate: effective LR of its last step, where known.

        Raises:
            RuntimeError: no episode is open.
            ValueError: the losses cannot be rewarded, see `episode_reward`.
        """
        if self.episode is None:
            raise RuntimeError("No episode is open.")
        config, selection, arm = self.config, self.episode.selection, self.episode.arm
        kind = config.reward
        if config.nonfinite == "skip" and min(losses) + config.reward_epsilon <= 0.0:
            kind = "slope"  # no reward may end a training, and the other has a logarithm
        score = episode_reward(
            losses,
            kind=kind,
            ema_alpha=config.ema_alpha,
            instability_lambda=config.reward_instability_lambda,
            epsilon=config.reward_epsilon,
            clip_min=config.reward_clip_min,
            clip_max=config.reward_clip_max,
        )
        if outcome is not None:
            score = replace(score, reward=config.reward_clip_min)
        if self._lr_bandit:
            self._lr_bandit.update(selection.lr_index, score.reward, selection.context)
        noise_bandit = self._noise_bandit(selection.lr_index)
        if noise_bandit:
            noise_bandit.update(selection.noise_index, score.reward, selection.context)
        record = EpisodeRecord(
            **asdict(score),
            lr_index=selection.lr_index,
            noise_index=selection.noise_index,
            lr_value=arm.lr_multiplier,
            noise_value=arm.noise_std,
            name=arm.name,
            start_step=self.episode.start_step,
            end_step=end_step,
            start_loss=losses[0],
            end_loss=losses[-1],
            update_norm=update_norm,
            context=selection.context,
            outcome=outcome,
            learning_rate=learning_rate,
        )
        self.records.append(record)
        closed = self.closed
        if settled(closed) == closed:
            kept = set(kept_numbers(closed))
            numbered = list(zip([*kept_numbers(closed - 1), closed], self.records, strict=True))
            gone = [record for number, record in numbered if number not in kept]
            self.records = [record for number, record in numbered if number in kept]
            self.left_out = sum_up(gone, self.left_out)
        self.episode = None
        return record

    def sound_loss(self) -> float | None:
        """Return the smoothed loss that the last sound episode ended with, if there was one."""
        for record in reversed(self.records):
            if record.outcome is None:
                return record.ema_end
        return None

    def logs(self) -> dict[str, list[object]]:
        """Return `records` under the published log keys."""
        return to_logs(
            self.records,
            with_context=self.config.context_mode != "none",
            with_outcome=self.config.divergence != "off",
        )

    def _noise_bandit(self, lr_index: int) -> Bandit | None:
        if not self._noise_bandits:
            return None
        return self._noise_bandits[lr_index if len(self._noise_bandits) > 1 else 0]

    def state_dict(self) -> StateDict:
        """Return all that later choices depend on, and the record, as JSON."""
        episode = None
        if self.episode is not None:
            selection = self.episode.selection
            episode = {
                "lr_index": selection.lr_index,
                "noise_index": selection.noise_index,
                "context": selection.context,
                "start_step": self.episode.start_step,
            }
        return {
            "version": STATE_VERSION,
            "settings": method_settings(self.config),
            "lr_bandit": self._lr_bandit.state_dict() if self._lr_bandit else None,
            "noise_bandits": [bandit.state_dict() for bandit in self._noise_bandits],
            "episode": episode,
            "records": records_to_json(self.records),
            "left_out": [asdict(arm) for arm in self.left_out],
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from `state_dict()`; the controller is unchanged if this raises.

        Raises:
            StateError: the state is damaged, of another version, or of other settings, which the
                message names with both values.
        """
        version = field(state, "version", integer)
        if version != STATE_VERSION:
            raise StateError(
                f"The saved state has version {version}, this release of pulseopt_hf reads "
                f"version {STATE_VERSION}. Resume with the release that wrote it."
            )
        check_settings(field(state, "settings", anything), self.config)
        records = field(state, "records", records_from_json)
        left_out: list[ArmTotals] = field(state, "left_out", totals_from_json)
        closed = len(records) + sum(arm.plays for arm in left_out)
        if len(records) != len(kept_numbers(closed)):
            raise StateError(
                f"`records` has {len(records)} of {closed} episodes and must have "
                f"{len(kept_numbers(closed))}."
            )
        episode = field(state, "episode", optional(self._episode_from_json))
        fresh = Controller(self.config)
        if fresh._lr_bandit:
            fresh._lr_bandit.load_state_dict(field(state, "lr_bandit", anything))
        saved = field(state, "noise_bandits", list_of(anything, len(fresh._noise_bandits)))
        for bandit, bandit_state in zip(fresh._noise_bandits, saved, strict=True):
            bandit.load_state_dict(bandit_state)
        self._lr_bandit, self._noise_bandits = fresh._lr_bandit, fresh._noise_bandits
        self.records, self.left_out, self.episode = records, left_out, None
        if episode is not None:
            self.open(*episode)

    def _episode_from_json(self, value: object, name: str) -> tuple[Selection, int]:
        lr_index = field(value, "lr_index", integer)
        noise_index = field(value, "noise_index", integer)
        context = field(value, "context", optional(text))
        if lr_index >= len(self.config.lr_candidates):
            raise StateError(f"`{name}.lr_index` is {lr_index}, which names no candidate.")
        if noise_index >= len(self.config.noise_candidates):
            raise StateError(f"`{name}.noise_index` is {noise_index}, which names no candidate.")
        expected = BUCKETS if self.config.context_mode == "trend" else (None,)
        if context not in expected:
            raise StateError(
                f"`{name}.context` is {shorten(context)}, which this run does not use."
            )
        return Selection(lr_index, noise_index, context), field(value, "start_step", integer)


def check_settings(saved: object, config: PulseOptConfig) -> None:
    """Raise `StateError` naming every method knob whose saved value is not this run's."""
    differing = [
        f"`{name}` was {shorten(old)} and is now {new!r}"
        for name, new in method_settings(config).items()
        if (old := field(saved, name, anything)) != new
    ]
    if differing:
        raise StateError(
            "The saved run had other settings: "
            + "; ".join(differing)
            + ". Set them back to resume it, or start a new run without resuming."
        )


def _bandit_factory(config: PulseOptConfig) -> BanditFactory:
    if config.control_mode == "random":
        return RandomBandit
    bandit: BanditFactory = BANDITS[config.bandit]
    if config.context_mode == "trend":
        return functools.partial(TrendBandit, bandit=bandit)
    return bandit
