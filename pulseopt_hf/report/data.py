"""What is known of a run, and what follows from it by counting. Standard library only."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pulseopt_hf.aees.calibration import Outcome, Trial
from pulseopt_hf.aees.records import EpisodeRecord
from pulseopt_hf.aees.run_record import Log

Status = Literal["finished", "stopped", "failed", "running", "silent"]
Series = list[tuple[int, float]]


@dataclass(frozen=True)
class ArmSummary:
    """How often an arm was played, and to what effect.

    Attributes:
        name: the arm's name.
        lr_multiplier: its LR multiplier.
        noise_std: its noise level.
        plays: episodes.
        steps: optimizer steps, from the first to the last of each episode.
        mean: mean reward.
        spread: standard deviation of the rewards over the sample, or `None` for a single episode.
        lowest: lowest reward.
        highest: highest reward.
    """

    name: str
    lr_multiplier: float
    noise_std: float
    plays: int
    steps: int
    mean: float
    spread: float | None
    lowest: float
    highest: float


@dataclass(frozen=True)
class RunData:
    """One run, as far as it has got. Steps are global steps of the optimizer.

    Attributes:
        folder: the run's folder.
        name: its name, whatever the user called it.
        status: `finished`; `stopped` before its last step, without an error; `failed` with
            `error`; `running`, written to lately; `silent`, neither ended nor written to lately,
            so it was killed or waits.
        step: steps done, as far as is written down.
        max_steps: steps of the whole run.
        base_lr: highest base LR of the schedule, as it was set, or `None` where it is not known.
        knobs: the method's settings; empty for a run without AEES.
        versions: version of each package, by name; empty where the run has no record.
        resumed_from: step of the checkpoint that it went on from last, or `None`.
        logs: what Trainer logged, oldest first.
        episodes: closed episodes, oldest first.
        trials: trials of the calibration, oldest first.
        outcome: what came of the calibration, or `None`.
        error: class of the exception that ended the run, or `None`.
        updated: when it was last written to, in seconds since 1970, or `None` if not known.
    """

    folder: Path
    name: str
    status: Status
    step: int
    max_steps: int
    base_lr: float | None
    knobs: dict[str, Any]
    versions: dict[str, str]
    resumed_from: int | None
    logs: list[Log]
    episodes: list[EpisodeRecord]
    trials: list[Trial]
    outcome: Outcome | None
    error: str | None
    updated: float | None

    def series(self, key: str) -> Series:
        """Return the finite values that were logged under a key, with their steps."""
        return series_of(self.logs, key)

    @property
    def loss(self) -> Series:
        """Training loss as Trainer logged it: a mean since the log before.

        Of a run that logged too seldom for a curve, the step losses at both ends of each episode.
        """
        if not self.logged_seldom:
            return self.series("loss")
        ends = [
            point
            for r in self.episodes
            for point in ((r.start_step + 1, r.start_loss), (r.end_step + 1, r.end_loss))
        ]
        return [(step, loss) for step, loss in ends if math.isfinite(loss)]

    @property
    def logged_seldom(self) -> bool:
        """Whether there are episodes and fewer than two logs of the training loss."""
        return bool(self.episodes) and len(self.series("loss")) < 2

    @property
    def eval_loss(self) -> Series:
        """Evaluation loss."""
        return self.series("eval_loss")

    @property
    def base_lrs(self) -> Series:
        """Base LR, as the scheduler set it."""
        return self.series("learning_rate")

    @property
    def effective_lrs(self) -> Series:
        """LR that `optimizer.step()` used; of a run that logged seldom, where episodes ended."""
        if not self.logged_seldom:
            return self.series("pulse/learning_rate")
        ends = [(r.end_step + 1, r.learning_rate) for r in self.episodes]
        return [(step, rate) for step, rate in ends if rate is not None]

    @property
    def metrics(self) -> dict[str, float]:
        """Latest value of every metric of an evaluation, such as `eval_loss`, without times."""
        clocks = ("runtime", "per_second", "_time")
        latest: dict[str, float] = {}
        for log in self.logs:
            for key, value in log.values.items():
                if key.startswith("eval_") and not key.endswith(clocks):
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        latest[key] = float(value)
        return latest

    @property
    def calibrated_lr(self) -> float | None:
        """The LR that a calibration found; `None` before it has, without one, and if it failed."""
        found = self.outcome
        return None if found is None or found.reason is not None else found.learning_rate

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that did not happen because something was not finite."""
        logged = self.series("pulse/skipped_steps")
        return int(logged[-1][1]) if logged else 0

    def skips(self) -> list[int]:
        """Return how many steps were skipped in each episode, as far as the log can tell.

        The log has a running count; what it grew by belongs to the episode of the step before.
        """
        counts = [0] * len(self.episodes)
        ends = [record.end_step for record in self.episodes]
        before = 0
        for step, total in self.series("pulse/skipped_steps"):
            grown, before = int(total) - before, int(total)
            index = bisect_left(ends, step - 1)
            if grown > 0 and index < len(counts):
                counts[index] += grown
        return counts

    @staticmethod
    def was_clipped(record: EpisodeRecord) -> bool:
        """Whether an episode's reward was clipped; one that diverged has the lowest instead."""
        return record.outcome is None and record.reward != record.reward_unclipped

    def arms(self) -> list[ArmSummary]:
        """Sum up the arms that were played, lowest LR multiplier first."""
        played: dict[tuple[float, float], list[EpisodeRecord]] = {}
        for record in self.episodes:
            played.setdefault((record.lr_value, record.noise_value), []).append(record)
        result = []
        for (lr, noise), records in sorted(played.items()):
            rewards = [record.reward for record in records]
            result.append(
                ArmSummary(
                    name=records[0].name,
                    lr_multiplier=lr,
                    noise_std=noise,
                    plays=len(records),
                    steps=sum(record.end_step - record.start_step + 1 for record in records),
                    mean=statistics.fmean(rewards),
                    spread=statistics.stdev(rewards) if len(rewards) > 1 else None,
                    lowest=min(rewards),
                    highest=max(rewards),
                )
            )
        return result


def series_of(logs: Sequence[Log], key: str) -> Series:
    """Return the finite values that were logged under a key, with their steps."""
    found = []
    for log in logs:
        value = log.values.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found.append((log.step, float(value)))
    return found
