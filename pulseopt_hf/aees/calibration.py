"""Calibration: finds the scale of the learning rate while training begins. Standard library only.

The search knows nothing of models. Whoever trains measures the probe's loss at the end of every
segment, hands it to `advance`, and does as the returned order says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pulseopt_hf.aees.state import (
    StateDict,
    StateError,
    field,
    integer,
    list_of,
    number,
    optional,
    text,
)

SHORTEST_RUN = 150  # optimizer steps; a shorter run has no time for a search
FIRST_SCALE = 1.0 / 300.0  # of the base LR, where the ladder begins
RUNG, LEAP = 3.0, 9.0  # factor from rung to rung, and where a rung hardly moved the loss
LOWEST_SCALE, HIGHEST_SCALE = 1e-8, 1e6
MOST_RUNGS = 16
CLEAR = 2.0  # Student's t over the probe's parts from which on a difference counts
HARM = 2.5  # the same for a duel to look at smaller LRs
SETBACK = 0.01  # share of the first probe loss that a rung may lose, since some starts are slow
FADING = 0.5  # a rung has to gain this share of the best rung's
WORTH = 0.05  # share of a duel's gain by which a larger LR has to win
SAFETY = 0.4  # of the highest good rung, to train on
TWO_DUELS = 450  # optimizer steps of a run that has both
DUELS = (0.1, 0.22)  # shares of the run at which duels begin
LADDER_END, DUEL_END = 0.4, 0.7  # shares of the run after which neither goes on
WIDEST = 8.0  # times the LR that a duel began with
NOT_FINITE = 1e9  # stands for a probe loss that is NaN or infinite

_PHASES = ("start", "ladder", "hold", "duel", "done")


@dataclass(frozen=True)
class Order:
    """What to do with the parameters at the end of a segment, in this order.

    Attributes:
        keep: copy them as the best so far.
        restore: put a copy back: `start`, the segment's, or `best`.
        mark: copy them as the start of what comes.
        finished: no copy will be asked for again.
    """

    keep: bool = False
    restore: str | None = None
    mark: bool = False
    finished: bool = False


@dataclass(frozen=True)
class Trial:
    """One segment that was tried out. Losses are means over the probe, in the training loss's unit.

    Attributes:
        phase: `ladder` or `duel`.
        scale: factor on the base LR.
        probe_before: the probe's loss at its start.
        probe_after: the same at its end.
        kept: whether training went on from its end.
        start_step: global step of its first optimizer step.
        end_step: global step after its last.
    """

    phase: str
    scale: float
    probe_before: float
    probe_after: float
    kept: bool
    start_step: int
    end_step: int


class Calibration:
    """Finds a factor on the base LR, in a ladder and two duels.

    The ladder climbs from 1/300 of the base LR in pulses of a few steps on one trajectory, each
    three times as high as the one before, for as long as the probe's loss falls at least half as
    much as in the best pulse. A pulse that does less is undone and ends it. Training goes on at
    two fifths of the highest good rung. At 10 % and 22 % of the run a duel plays the LR against
    twice itself from one snapshot, and against four and eight times if that wins; training goes on
    from the winner's end. Where the LR does harm, the duel plays its half instead.

    In a pulse the LR falls to zero over its second half, since a smaller LR always looks better
    for a moment: it removes noise that the end of the run removes anyway. Differences are counted
    in standard errors over the probe's parts, which are paired.

    The ladder is a learning-rate range test (Smith, arXiv 1506.01186) on the training run itself;
    duels from a snapshot are those of AutoLRS (Jin et al., ICLR 2021), without a model of the loss.

    Args:
        max_steps: optimizer steps of the run, >= `SHORTEST_RUN`.
    """

    def __init__(self, max_steps: int) -> None:
        """See the class."""
        if max_steps < SHORTEST_RUN:
            raise ValueError(f"Calibration needs {SHORTEST_RUN} optimizer steps, got {max_steps}.")
        self.max_steps = max_steps
        self.phase = "start"
        self.scale = FIRST_SCALE  # of the segment that runs
        self.trials: list[Trial] = []
        self._start = self._end = 0  # global steps of the segment
        self._before: list[float] = []  # probe losses at its start
        self._first = 0.0  # mean probe loss before training
        self._good: float | None = None  # highest good rung
        self._best_gain = 0.0  # of a rung, per full pulse
        self._leapt_back = False
        self._duels = 0  # begun
        self._center: float | None = None  # scale that the duel began with
        self._winner: list[float] = []  # probe losses of the best arm of the duel
        self._winner_scale: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether the scale is final."""
        return self.phase == "done"

    def is_due(self, step: int) -> bool:
        """Whether the probe is to be measured before the optimizer step `step`."""
        return not self.is_done and step >= self._end

    def needs(self, name: str) -> bool:
        """Whether the copy `start` or `best` may still be asked for."""
        if name == "start":
            return self.phase in ("ladder", "duel")
        return self.phase == "duel" and bool(self._winner)

    def multiplier(self, step: int) -> float:
        """Return the factor on the base LR in optimizer step `step`."""
        if self.phase not in ("ladder", "duel"):
            return self.scale
        length, done = self._end - self._start, step - self._start
        half = length // 2
        if done < half:
            return self.scale
        return self.scale * (length - done) / (length - half + 1)

    def advance(self, step: int, losses: Sequence[float]) -> Order:
        """End the segment before optimizer step `step` and begin the next.

        Args:
            step: global step, >= the segment's end.
            losses: the probe's loss now, part by part, shape (k,), k >= 2, the same parts always.

        Returns:
            What to do with the parameters before that step.
        """
        now = [x if abs(x) < NOT_FINITE else NOT_FINITE for x in losses]  # NaN is below nothing
        if self.phase == "start":
            self._first = _mean(now)
            return self._climb(step, now, FIRST_SCALE, mark=True)
        if self.phase == "ladder":
            return self._end_rung(step, now)
        if self.phase == "hold":
            return self._begin_duel(step, now)
        return self._end_round(step, now)

    # The ladder.

    def _climb(self, step: int, before: list[float], scale: float, *, mark: bool) -> Order:
        self.phase, self.scale, self._before = "ladder", scale, before
        pulse = self._pulse(75, 8, 16)
        self._segment(step, pulse // 2 if self._is_scouting else pulse)
        return Order(restore=None if mark else "start", mark=mark)

    @property
    def _is_scouting(self) -> bool:
        """Whether rungs still hardly move the loss, so that half a pulse shows as much."""
        return self._best_gain < 0.002 * self._first

    def _end_rung(self, step: int, now: list[float]) -> Order:
        fall, t = _fall(self._before, now)
        gain = fall * self._pulse(75, 8, 16) / (self._end - self._start)
        fades = self._best_gain > 0.004 * self._first and gain < FADING * self._best_gain
        harmful = fall < -2 * SETBACK * self._first or (
            t < -CLEAR and fall < -SETBACK * self._first
        )
        late = step >= LADDER_END * self.max_steps or len(self.trials) + 1 >= MOST_RUNGS
        bad = harmful or (fades and self._good is not None)
        self._note(now, kept=not bad, step=step)
        if bad and self._good is None:
            if late or self.scale / LEAP < LOWEST_SCALE:
                return self._hold(step, self.scale / LEAP, restore="start")
            return self._climb(step, self._before, self.scale / LEAP, mark=False)
        if bad:
            assert self._good is not None
            if self.scale > RUNG * self._good * 1.5 and not self._leapt_back and not late:
                self._leapt_back = True
                return self._climb(step, self._before, self._good * RUNG, mark=False)
            return self._hold(step, SAFETY * self._good, restore="start")
        self._good = self.scale
        if t > CLEAR:
            self._best_gain = max(self._best_gain, gain)
        if self._leapt_back or late or self.scale * RUNG > HIGHEST_SCALE:
            return self._hold(step, SAFETY * self._good)
        # Unclear at first means too small to see; unclear later may be a slow start.
        leaps = self._is_scouting and (t > CLEAR or len(self.trials) < 3) and len(self.trials) < 6
        return self._climb(step, now, self.scale * (LEAP if leaps else RUNG), mark=True)

    def _hold(self, step: int, scale: float, restore: str | None = None) -> Order:
        """Train on at `scale` until the next duel, or for good."""
        self.scale = min(max(scale, LOWEST_SCALE), HIGHEST_SCALE)
        # The second duel of a short run would cost more than it wins.
        if self._duels == (len(DUELS) if self.max_steps >= TWO_DUELS else 1):
            self.phase = "done"
            return Order(restore=restore, finished=True)
        self.phase = "hold"
        # At least a few steps, so that one that follows another is played from a settled state.
        until = max(int(DUELS[self._duels] * self.max_steps), step + self._pulse(60, 10, 40) // 2)
        self._segment(step, until - step)
        return Order(restore=restore)

    # Duels.

    def _begin_duel(self, step: int, now: list[float]) -> Order:
        self._duels += 1
        self._center, self._before = self.scale, now
        self._winner, self._winner_scale = [], self.scale
        return self._play(step, self.scale, mark=True)

    def _play(self, step: int, scale: float, *, mark: bool = False, keep: bool = False) -> Order:
        self.phase, self.scale = "duel", scale
        self._segment(step, self._pulse(60, 10, 40))
        return Order(keep=keep, restore=None if mark else "start", mark=mark)

    def _end_round(self, step: int, now: list[float]) -> Order:
        assert self._center is not None
        assert self._winner_scale is not None
        if not self._winner:  # the LR as it was has been played
            harmful = _fall(self._before, now)[1] < -HARM
            self._winner = now
            self._note(now, kept=True, step=step)
            return self._play(step, self._center * (0.5 if harmful else 2.0), keep=True)
        wins = self._wins(now)
        self._note(now, kept=wins, step=step)
        if not wins:
            return self._hold(step, self._winner_scale, restore="best")
        # Whatever was kept before is superseded.
        self._disown_former_winner()
        self._winner, self._winner_scale = now, self.scale
        further = 2.0 * self.scale
        if (
            self.scale < self._center
            or further > WIDEST * self._center
            or step >= DUEL_END * self.max_steps
        ):
            return self._hold(step, self.scale)
        return self._play(step, further, keep=True)

    def _wins(self, now: list[float]) -> bool:
        """Whether the arm just played beats the best before, and has gained at all."""
        lead, t = _fall(self._winner, now)
        gain, gain_t = _fall(self._before, now)
        return t > CLEAR and gain_t > CLEAR and lead > WORTH * max(gain, 0.0)

    def _disown_former_winner(self) -> None:
        for index in range(len(self.trials) - 2, -1, -1):
            trial = self.trials[index]
            if trial.phase == "duel" and trial.kept:
                self.trials[index] = Trial(**{**asdict(trial), "kept": False})
                return

    def _pulse(self, share: int, shortest: int, longest: int) -> int:
        return min(max(self.max_steps // share, shortest), longest)

    def _segment(self, step: int, length: int) -> None:
        self._start, self._end = step, step + length

    def _note(self, now: list[float], *, kept: bool, step: int) -> None:
        self.trials.append(
            Trial(self.phase, self.scale, _mean(self._before), _mean(now), kept, self._start, step)
        )

    def state_dict(self) -> StateDict:
        """Return all that later decisions depend on, as JSON."""
        return {
            "max_steps": self.max_steps,
            "phase": self.phase,
            "scale": self.scale,
            "start": self._start,
            "end": self._end,
            "before": list(self._before),
            "first": self._first,
            "good": self._good,
            "best_gain": self._best_gain,
            "leapt_back": int(self._leapt_back),
            "duels": self._duels,
            "center": self._center,
            "winner": list(self._winner),
            "winner_scale": self._winner_scale,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from `state_dict()`; nothing is changed if this raises.

        The length of the run is the saved one, so that a run made longer keeps its plan.

        Raises:
            StateError: the state is damaged.
        """
        fresh = Calibration(max(field(state, "max_steps", integer), SHORTEST_RUN))
        fresh.phase = field(state, "phase", text)
        if fresh.phase not in _PHASES:
            raise StateError(f"`phase` must be one of {', '.join(_PHASES)}, got {fresh.phase!r}.")
        fresh.scale = field(state, "scale", _scale)
        fresh._start, fresh._end = field(state, "start", integer), field(state, "end", integer)
        if fresh.phase != "start" and fresh._end <= fresh._start:
            raise StateError(f"The segment from {fresh._start} to {fresh._end} has no step.")
        fresh._before = field(state, "before", list_of(_loss))
        fresh._first = field(state, "first", _loss)
        fresh._good = field(state, "good", optional(_scale))
        fresh._best_gain = field(state, "best_gain", _loss)
        fresh._leapt_back = bool(field(state, "leapt_back", integer))
        fresh._duels = field(state, "duels", integer)
        fresh._center = field(state, "center", optional(_scale))
        fresh._winner = field(state, "winner", list_of(_loss))
        fresh._winner_scale = field(state, "winner_scale", optional(_scale))
        fresh.trials = field(state, "trials", list_of(trial_from_json))
        lengths = {len(fresh._before), len(fresh._winner)} - {0}
        if len(lengths) > 1 or (fresh.phase != "start" and len(fresh._before) < 2):
            raise StateError("The probe losses of the saved calibration do not fit each other.")
        if fresh.phase == "duel" and None in (fresh._center, fresh._winner_scale):
            raise StateError("The saved calibration is in a duel without arms.")
        if fresh._duels > len(DUELS) or (fresh.phase == "hold" and fresh._duels == len(DUELS)):
            raise StateError(f"`duels` must be at most {len(DUELS)}, got {fresh._duels}.")
        self.__dict__.update(fresh.__dict__)


def trial_from_json(value: object, name: str) -> Trial:
    """Rebuild a trial from a mapping of its attributes.

    Raises:
        StateError: an attribute is missing or of another type.
    """
    kept = field(value, "kept", lambda item, _: item)
    if not isinstance(kept, bool):
        raise StateError(f"`{name}.kept` must be true or false.")
    return Trial(
        field(value, "phase", text),
        field(value, "scale", number),
        field(value, "probe_before", number),
        field(value, "probe_after", number),
        kept,
        field(value, "start_step", integer),
        field(value, "end_step", integer),
    )


def _scale(value: object, name: str) -> float:
    result = number(value, name)
    if not LOWEST_SCALE / 1e3 <= result <= HIGHEST_SCALE * 1e3:
        raise StateError(f"`{name}` is no factor that a search would choose: {result}.")
    return result


def _loss(value: object, name: str) -> float:
    result = number(value, name)
    if abs(result) > LEAP * MOST_RUNGS * NOT_FINITE:
        raise StateError(f"`{name}` is no loss that a probe could have: {result}.")
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _fall(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the mean fall from `before` to `after`, paired, and its Student's t."""
    falls = [b - a for b, a in zip(before, after, strict=True)]
    mean = _mean(falls)
    variance = sum((x - mean) ** 2 for x in falls) / (len(falls) - 1)
    return mean, mean / (math.sqrt(variance / len(falls)) + 1e-12)
