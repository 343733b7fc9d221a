"""What is known of a run, and what follows from it by counting. Standard library only."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pulseopt_hf.aees.calibration import Outcome, Trial
from pulseopt_hf.aees.episode_record import EpisodeRecord
from pulseopt_hf.aees.left_out import ArmTotals, sum_up
from pulseopt_hf.aees.record_format import Head, Log

Status = Literal["finished", "stopped", "failed", "running", "silent"]
Series = list[tuple[int, float]]

_FEW_LOGS = 20  # with fewer, and more episodes than logs, curves are drawn from the episodes
# How the names end of the times that an evaluation logs, of a second data set too.
_TIME = re.compile(r"(runtime|per_second|_time)(_mm|_\d+)?$")


@dataclass(frozen=True, kw_only=True)
class RunData(Head):
    """A run's head, and how far it has got. Steps are global steps of the optimizer."""

    folder: Path
    status: Status  # `silent`: neither ended nor written to lately, so it was killed or waits
    step: int  # steps done, as far as is recorded
    logs: list[Log]  # what Trainer logged, oldest first, as all that follow
    times: Series  # step and seconds since this process began to train, of logs until the end
    episodes: list[EpisodeRecord]
    numbers: list[int]  # of the episodes, from 1: the record of a long run leaves some out
    trials: list[Trial]
    outcome: Outcome | None  # of the calibration
    error: str | None  # class of the exception that ended the run
    updated: float | None  # when it was last written to, in seconds since 1970

    @property
    def has_ended(self) -> bool:
        """Whether training has ended, however it did."""
        return self.status in ("finished", "stopped", "failed")

    @property
    def has_arms(self) -> bool:
        """Whether more than one arm was played."""
        return len(self.arms()) > 1

    @property
    def episode_count(self) -> int:
        """How many episodes there were, those that the record leaves out among them."""
        return max(self.numbers, default=0)

    def series(self, key: str) -> Series:
        """Return the finite values that were logged under a key, with their steps."""
        return [
            (log.step, float(value))
            for log in self.logs
            if isinstance(value := log.values.get(key), int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
        ]

    @property
    def logged_seldom(self) -> bool:
        """Whether the episodes tell more of the training loss than the logs do."""
        return len(self.series("loss")) < min(_FEW_LOGS, len(self.episodes))

    @property
    def loss(self) -> Series:
        """Training loss: the means that were logged.

        Of a run that logged seldom, the step losses at both ends of each episode.
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
    def base_lrs(self) -> Series:
        """Base LR, as the scheduler set it."""
        return [(step, rate) for step, rate in self.series("learning_rate") if rate > 0]

    @property
    def effective_lrs(self) -> Series:
        """LR that `optimizer.step()` used; of a run that logged seldom, where episodes ended."""
        rates = self.series("pulse/learning_rate")
        if self.logged_seldom:
            ends = [(r.end_step + 1, r.learning_rate) for r in self.episodes]
            rates = [(step, rate) for step, rate in ends if rate is not None]
        return [(step, rate) for step, rate in rates if rate > 0]

    @property
    def metrics(self) -> dict[str, float]:
        """Latest value of every metric of an evaluation, `eval_loss` first, without times."""
        keys = dict.fromkeys(key for log in self.logs for key in log.values)
        return {
            key: series[-1][1]
            for key in sorted(keys, key=lambda key: key != "eval_loss")
            if is_metric(key)
            if (series := self.series(key))
        }

    @property
    def calibrated_lr(self) -> float | None:
        """The LR that a calibration found; `None` before it has, without one, and if it failed."""
        found = self.outcome
        return None if found is None or found.reason is not None else found.learning_rate

    @property
    def steps_per_second(self) -> float | None:
        """Optimizer steps per second of this process, all that it did besides included."""
        if not self.times or self.times[-1][1] <= 0:
            return None
        return (self.times[-1][0] - (self.resumed_from or 0)) / self.times[-1][1]

    @property
    def speed(self) -> Series:
        """Optimizer steps per second from one log to the next, without evaluations."""
        logs = pairwise(self.times)
        return [(s2, (s2 - s1) / (t2 - t1)) for (s1, t1), (s2, t2) in logs if s2 > s1 and t2 > t1]

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
            if grown > 0 and index < len(counts) and self.episodes[index].start_step < step:
                counts[index] += grown
        return counts

    @staticmethod
    def was_clipped(record: EpisodeRecord) -> bool:
        """Whether an episode's reward was clipped; one that diverged has the lowest instead."""
        return record.outcome is None and record.reward != record.reward_unclipped

    def arms(self) -> list[ArmTotals]:
        """Sum up the arms of all episodes, lowest LR multiplier first."""
        return sum_up(self.episodes, self.left_out)


def is_metric(key: str) -> bool:
    """Whether what was logged under a key is a metric of an evaluation, and not a time."""
    return key.startswith("eval_") and _TIME.search(key) is None
