"""Calibration: finds the scale of the learning rate by single trial steps. Standard library only.

The search knows nothing of models. Whoever trains takes the trial steps, measures how far each one
moved the probe's losses and the weights, hands that to `advance`, and does as the order says.
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
    text,
)

SHORTEST_RUN = 50  # optimizer steps; a shorter run has none to spare
LOSS_RADIUS = 0.05  # share of the probe's mean loss by which one step may move the loss of a row
COIN_TOSS = math.log(2.0)  # most that the mean loss of a classifier counts in that, in nats
WEIGHT_RADIUS = 0.25  # share of its norm by which one step may move the weights
FIRST_SCALE = 1.0 / 300.0  # of the base LR, where the trial steps begin
LOWEST_SCALE, HIGHEST_SCALE = 1e-8, 1e8
GROWTH = 100.0  # most that a scale is multiplied by from one trial step to the next
RETREAT = 30.0  # divisor after a step whose losses are not finite
READABLE = 0.2  # share of a radius that a movement must reach to be believed
TRUSTED = 6  # trial steps near the scale found that end the search
NEAR = 3.0  # factor within which a trial step's scale counts as near
MOST_TRIALS = 16
RAMP = 0.05  # share of the run in which the LR rises, where the schedule has no warm-up

_PHASES = ("start", "trials", "done")


@dataclass(frozen=True)
class Movement:
    """How far one trial step went.

    Attributes:
        losses: the probe's loss after it, row by row, shape (n,), in the training loss's unit.
        weights: norm of the change of the weights over the norm of the weights; 0 where unknown.
    """

    losses: Sequence[float]
    weights: float


@dataclass(frozen=True)
class Order:
    """What to do with the parameters before the next step.

    Attributes:
        mark: copy them as the origin.
        restore: put the origin back.
        finished: the origin will not be asked for again.
    """

    mark: bool = False
    restore: bool = False
    finished: bool = False


@dataclass(frozen=True)
class Trial:
    """One trial step.

    Attributes:
        scale: factor on the base LR.
        loss_movement: root mean square of the change of the rows' losses, as a share of their mean
            before, see `Calibration.begin`. Infinite losses count as 1e9.
        weight_movement: see `Movement.weights`.
        probe_before: mean loss of the probe before it, in the training loss's unit.
        probe_after: the same after it.
        kept: whether training went on from its end.
        step: global step of the trial.
    """

    scale: float
    loss_movement: float
    weight_movement: float
    probe_before: float
    probe_after: float
    kept: bool
    step: int


class Calibration:
    """Finds the factor on the base LR at which one step stays within a trust region.

    Every trial takes one optimizer step from the same parameters, those before training, with a
    batch of its own. It moves the loss of each row of a probe, and the weights. With a step's
    movement r of the losses (the root mean square over rows, relative to their mean) and w of the
    weights (relative to their norm), a trial at scale s says that the largest scale allowed is

        s * min(LOSS_RADIUS / r, WEIGHT_RADIUS / w)

    because for small s both grow in proportion. The search starts far below the base LR, jumps to
    what the last trial allows, and ends with six trials near the smallest scale allowed by any.
    The smallest, since a batch that happens to be balanced hardly moves the probe: of two classes
    and eight rows every fourth is. Training begins from the last trial's end, with a warm-up.

    That the step of a well-chosen LR moves what the model computes by a set amount, whatever its
    width, is the condition of maximal-update parametrisation (Yang et al., "Tensor Programs V",
    2022, arXiv 2203.03466); here it is measured instead of derived. Unlike a range test (Smith,
    arXiv 1506.01186) it does not wait for the loss to fall, which in a fine-tuning can take longer
    than any search may last.

    Args:
        max_steps: optimizer steps of the run, >= `SHORTEST_RUN`.
        ramp: whether the LR rises over the first `RAMP` of the run after the search; for schedules
            without a warm-up of their own.
    """

    def __init__(self, max_steps: int, *, ramp: bool = True) -> None:
        """See the class."""
        if max_steps < SHORTEST_RUN:
            raise ValueError(f"Calibration needs {SHORTEST_RUN} optimizer steps, got {max_steps}.")
        self.max_steps = max_steps
        self.ramp = ramp
        self.phase = "start"
        self.scale = FIRST_SCALE  # of the trial that runs, and in the end the one found
        self.trials: list[Trial] = []
        self.probes = 0  # times that the probe was measured
        self._step = 0  # global step of the trial that runs, or of the first step after the search
        self._origin: list[float] = []  # the probe's losses before training
        self._unit = 1.0  # that movements of the losses are shares of

    @property
    def is_done(self) -> bool:
        """Whether the scale is final."""
        return self.phase == "done"

    @property
    def failed(self) -> bool:
        """Whether the search ended without a scale, so that the base LR stands."""
        return search_failed(self.trials)

    def is_due(self, step: int) -> bool:
        """Whether the probe is to be measured before the optimizer step `step`."""
        return self.phase == "start" or (self.phase == "trials" and step > self._step)

    def postpone(self, step: int) -> None:
        """Take the trial again in optimizer step `step`, since its own was skipped."""
        self._step = step

    def multiplier(self, step: int) -> float:
        """Return the factor on the base LR in optimizer step `step`."""
        if not self.is_done or not self.ramp:
            return self.scale
        rise = max(1, int(RAMP * self.max_steps))
        return self.scale * min(1.0, (step - self._step + 1) / rise)

    def begin(self, step: int, losses: Sequence[float], *, of_classes: bool = False) -> Order:
        """Begin the search before optimizer step `step`.

        Args:
            step: global step, >= 0.
            losses: the probe's loss row by row, shape (n,), n >= 2.
            of_classes: whether they are cross-entropies of one class a row. How far a step of the
                logits moves such a loss does not depend on the number of classes, as the loss does,
                so that movements are shares of no more than `COIN_TOSS`.

        Returns:
            What to do with the parameters before that step.
        """
        self._origin = _finite(losses)
        # A mean loss of zero has no shares; a loss is then measured in its own unit.
        self._unit = abs(_mean(self._origin)) or 1.0
        if of_classes:
            self._unit = min(self._unit, COIN_TOSS)
        self.probes += 1
        self.phase, self._step = "trials", step
        return Order(mark=True)

    def abandon(self) -> None:
        """End the search before it began; the base LR stands."""
        self.phase, self.scale, self.ramp = "done", 1.0, False

    def advance(self, step: int, moved: Movement) -> Order:
        """End a trial before optimizer step `step`, and begin the next or end the search.

        Args:
            step: global step, one more than the trial's or later.
            moved: how far the trial's step went; as many losses as `begin` was given.

        Returns:
            What to do with the parameters before that step.
        """
        self.probes += 1
        now, before = _finite(moved.losses), _mean(self._origin)
        change = _mean([(b - a) ** 2 for a, b in zip(self._origin, now, strict=True)])
        movement = math.sqrt(change) / self._unit
        trial = Trial(self.scale, movement, moved.weights, before, _mean(now), False, self._step)
        self.trials.append(trial)
        if (found := scale_found(self.trials)) is not None:
            return self._finish(step, found)
        self.scale = _bounded(self._next(trial, _allowed(self.trials)))
        self._step = step
        return Order(restore=True)

    def _next(self, trial: Trial, allowed: float | None) -> float:
        if allowed is None:
            return trial.scale * min(GROWTH, max(NEAR, _largest(trial) / trial.scale))
        if not any(other.scale < allowed / NEAR for other in self.trials):
            return min(other.scale for other in self.trials) / RETREAT
        return allowed

    def _finish(self, step: int, found: float) -> Order:
        """Take the scale found; the last trial's step stays where it was not much too large."""
        last = self.trials[-1]
        keeps = not self.failed and max(_shares(last)) <= NEAR
        if keeps:
            self.trials[-1] = Trial(**{**asdict(last), "kept": True})
        self.scale, self.phase, self._step = found, "done", step
        self.ramp = self.ramp and not self.failed  # a base LR that stands is taken as it is
        self._origin = []
        return Order(restore=not keeps, finished=True)

    def state_dict(self) -> StateDict:
        """Return all that later decisions depend on, as JSON."""
        return {
            "max_steps": self.max_steps,
            "ramp": self.ramp,
            "phase": self.phase,
            "scale": self.scale,
            "step": self._step,
            "probes": self.probes,
            "origin": list(self._origin),
            "unit": self._unit,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from `state_dict()`; nothing is changed if this raises.

        The length of the run is the saved one, so that a run made longer keeps its plan.

        Raises:
            StateError: the state is damaged.
        """
        fresh = Calibration(
            max(field(state, "max_steps", integer), SHORTEST_RUN), ramp=field(state, "ramp", _flag)
        )
        fresh.phase = field(state, "phase", text)
        if fresh.phase not in _PHASES:
            raise StateError(f"`phase` must be one of {', '.join(_PHASES)}, got {fresh.phase!r}.")
        fresh.scale = field(state, "scale", _scale)
        fresh._step = field(state, "step", integer)
        fresh.probes = field(state, "probes", integer)
        fresh._origin = field(state, "origin", list_of(_loss))
        fresh._unit = field(state, "unit", _positive)
        fresh.trials = field(state, "trials", list_of(trial_from_json))
        if (fresh.phase == "trials") != (len(fresh._origin) >= 2):
            raise StateError(
                f"`origin` has {len(fresh._origin)} losses, which does not fit the phase "
                f"{fresh.phase!r}."
            )
        if len(fresh.trials) > MOST_TRIALS:
            raise StateError(f"`trials` must be at most {MOST_TRIALS}, got {len(fresh.trials)}.")
        self.__dict__.update(fresh.__dict__)


def scale_found(trials: Sequence[Trial]) -> float | None:
    """Return the scale that a search decides on after these trials, or `None` if it goes on.

    It is 1 if the search fails: the base LR is kept.
    """
    if search_failed(trials):
        return 1.0
    allowed = _allowed(trials)
    return _bounded(allowed) if allowed is not None and _is_settled(trials, allowed) else None


def search_failed(trials: Sequence[Trial]) -> bool:
    """Whether a search gives up: nothing moved, or what moved did not depend on the LR."""
    return len(trials) >= MOST_TRIALS and not _is_settled(trials, _allowed(trials))


_NOT_FINITE = 1e9  # stands for a loss that is NaN or infinite


def _finite(losses: Sequence[float]) -> list[float]:
    return [x if abs(x) < _NOT_FINITE else _NOT_FINITE for x in losses]  # NaN is below nothing


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _bounded(scale: float) -> float:
    return min(max(scale, LOWEST_SCALE), HIGHEST_SCALE)


def _allowed(trials: Sequence[Trial]) -> float | None:
    """Return the smallest scale that a trial allows, of those that moved anything readably."""
    return min((_largest(trial) for trial in trials if _is_readable(trial)), default=None)


def _is_settled(trials: Sequence[Trial], allowed: float | None) -> bool:
    if allowed is None:
        return False
    near = [t for t in trials if allowed / NEAR <= t.scale <= allowed * NEAR]
    # Without a smaller one it is not known that movements still grow with the scale.
    smaller = any(trial.scale < allowed / NEAR for trial in trials)
    return smaller and len(near) >= TRUSTED


def _shares(trial: Trial) -> tuple[float, float]:
    """Return a trial's movements as shares of the radii: of the losses, and of the weights."""
    return trial.loss_movement / LOSS_RADIUS, trial.weight_movement / WEIGHT_RADIUS


def _is_readable(trial: Trial) -> bool:
    return max(_shares(trial)) >= READABLE


def _largest(trial: Trial) -> float:
    """Return the largest scale that a trial allows: infinite if it moved nothing."""
    # Where losses are not finite, how far they moved says nothing of how far is too far.
    share = RETREAT if trial.probe_after > 0.01 * _NOT_FINITE else max(_shares(trial))
    return trial.scale / share if share > 0.0 else math.inf


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise StateError(f"`{name}` must be true or false.")
    return value


def _scale(value: object, name: str) -> float:
    result = number(value, name)
    if not LOWEST_SCALE <= result <= HIGHEST_SCALE:
        raise StateError(f"`{name}` is no factor that a search would choose: {result}.")
    return result


def _positive(value: object, name: str) -> float:
    result = number(value, name)
    if not 0.0 < result <= _NOT_FINITE:
        raise StateError(f"`{name}` is no loss that movements could be shares of: {result}.")
    return result


def _loss(value: object, name: str) -> float:
    result = number(value, name)
    if abs(result) > _NOT_FINITE:
        raise StateError(f"`{name}` is no loss that a probe could have: {result}.")
    return result


def trial_from_json(value: object, name: str) -> Trial:
    """Rebuild a trial from a mapping of its attributes.

    Raises:
        StateError: an attribute is missing or of another type.
    """
    return Trial(
        field(value, "scale", _scale),
        field(value, "loss_movement", number),
        field(value, "weight_movement", number),
        field(value, "probe_before", number),
        field(value, "probe_after", number),
        field(value, "kept", _flag),
        field(value, "step", integer),
    )
