"""Calibration: the search for a learning rate by trial steps. Standard library only.

The search knows nothing of models. Whoever trains takes the trials, measures how far each one went
and adds it here; the next LR to try, and in the end the LR found, follow from the trials alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pulseopt_hf.aees.json_checks import (
    StateDict,
    StateError,
    dataclass_of,
    field,
    from_one,
    integer,
    list_of,
    number,
    optional,
)

SHORTEST_RUN = 50  # optimizer steps; a shorter run has none to spare
OUTPUT_RADIUS = 3.3  # how far one step may move what the model computes, see `Trial.movement`
WEIGHT_RADIUS = 0.25  # share of its norm by which one step may move the weights
PASSES_EXPONENT = 4.0 / 5.0  # of the number of passes, by which the LR is divided
SHORT_RUN = 600  # optimizer steps; the LR of a shorter run is higher
STEPS_EXPONENT = 1.0 / 2.0  # of the share of these steps that it has, by which the LR is divided
LAYERS = 2.0  # of a new model, for which `OUTPUT_RADIUS` stands; it grows with their number
FIRST_SCALE = 1.0 / 300.0  # of the LR that was set, where the search begins
GROWTH = 100.0  # most that the LR is multiplied by from one trial to the next
RETREAT = 30.0  # divisor after a trial whose outputs are not finite
TRIAL_SHARE = 0.5  # of what a step may move that a trial aims at, since large steps saturate
READABLE = 0.2  # share of a radius that a trial must reach to count; rounding in bf16 makes 0.1
FAINT = 0.05  # share of the weights' movement that the outputs' must reach, in shares of the radii
NEAR = 3.0  # factor within which a trial is near the radius
SMALL = NEAR * NEAR  # how much smaller a trial must be to show that movement answers to the LR
HARDLY = 1e-4  # share of their norm; weights that move by less hardly move
AHEAD = 10.0  # times the LR that seems to be allowed, for a trial to see if outputs level off
TRUSTED = 5  # trials near the radius, each of a batch of its own, that end the search
MOST_TRIALS = 18
LOWEST_LR, HIGHEST_LR = 1e-12, 1e6
NOT_FINITE = 1e9  # stands for a movement that is NaN or infinite


@dataclass(frozen=True)
class Trial:
    """One trial: an optimizer step that was measured and undone.

    Attributes:
        learning_rate: its LR, in the parameter group with the highest LR.
        movement: how far it moved what the model computes, as a multiple of what 10 % dropout
            does; see `pulseopt_hf.optim.movement`. At most `NOT_FINITE`, which stands for NaN and
            infinity.
        weight_movement: RMS change of the elements of the weight matrices that moved, over the RMS
            of those that were not zero; 0 if unknown.
        own_batch: whether the movement was measured on the batch of the step itself. Such a trial
            overstates the movement and only guides the search.
        step: global step.
    """

    learning_rate: float
    movement: float
    weight_movement: float
    own_batch: bool
    step: int

    @property
    def share(self) -> float:
        """The larger of its movements, as a share of its radius."""
        return max(self.movement / OUTPUT_RADIUS, self.weight_movement / WEIGHT_RADIUS)

    @property
    def is_silent(self) -> bool:
        """Whether the outputs hardly moved for what happened to the weights."""
        return self.movement <= FAINT * self.share * OUTPUT_RADIUS

    @property
    def is_near(self) -> bool:
        """Whether it went about as far as a step may go, and moved the outputs too."""
        return READABLE <= self.share <= NEAR and not self.is_silent

    def moved(self) -> tuple[str, str]:
        """Write how far it moved the outputs, in units of dropout's, and the weights."""
        outputs, weights = self.movement, self.weight_movement
        return (
            f"{outputs:.2f}x" if outputs < NOT_FINITE else "inf or NaN",
            f"{weights:.2%}" if weights < NOT_FINITE else "inf or NaN",
        )


@dataclass(frozen=True)
class Outcome:
    """The result of a calibration. The latest one counts: the safety net may revoke an LR.

    Attributes:
        set_lr: the LR that was set: the highest peak of all parameter groups.
        learning_rate: the LR that is used; `set_lr` if none was found.
        limited_by: why the LR is not higher: `outputs` or `weights`; `None` if none was found.
        reason: why none was found, or `None`.
        step: global step of the decision.
        factor: what the LR at the limit was multiplied by.
        factor_for: what for, or `None` if the factor is about 1.
    """

    set_lr: float
    learning_rate: float
    limited_by: str | None
    reason: str | None
    step: int
    factor: float = 1.0
    factor_for: str | None = None

    def __str__(self) -> str:
        """Say it in one line."""
        if self.reason is not None:
            return not_calibrated(self.reason)
        moved = "what the model computes" if self.limited_by == "outputs" else "the weights"
        times = f", times {self.factor:.3g} for {self.factor_for}" if self.factor_for else ""
        return (
            f"Learning rate calibrated: {self.set_lr:.3g} was set, {self.learning_rate:.3g} is "
            f"used ({self.learning_rate / self.set_lr:.3g} times). It is the highest at which one "
            f"step does not move {moved} too far{times}. To keep {self.set_lr:.3g}, set "
            "calibration='off'."
        )


def not_calibrated(reason: str) -> str:
    """Return the one line that says why a LR stays as it was set."""
    return f"The learning rate is not calibrated: {reason}. The one that was set is used."


def deciding(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that decide: near the radius, the latest of each batch but the first."""
    latest = {trial.step: trial for trial in trials if not trial.own_batch}
    return [trial for trial in latest.values() if trial.is_near]


class Calibration:
    """Finds the LR at which one optimizer step stays within a trust region.

    Every trial is one optimizer step from the same parameters and optimizer state, those before
    training. It moves what the model computes by r and the weights by w, both in proportion to the
    LR as long as they are small. The LR found is the largest that keeps both within their radii:

        LR = min(OUTPUT_RADIUS / rms(r_b / LR_b), WEIGHT_RADIUS / rms(w_b / LR_b))

    over trials b near the radius, each on a batch of its own: batches differ, and one that happens
    to be balanced hardly moves a classifier.

    A pretrained model with a new head is another matter: it learns the rows by heart in later
    passes, and in a short run its head does not get far. So n passes divide that by
    n^PASSES_EXPONENT, and T < SHORT_RUN steps by (T / SHORT_RUN)^STEPS_EXPONENT.

    All layers of a new model move its outputs the same way in the first step, and no more in later
    ones. So the outputs' radius of one with L > LAYERS layers is L / LAYERS times as large.

    The search begins far below the LR that was set and goes to half of what the last trial allows:
    the outputs of a model from scratch soon saturate, and a step that hardly moves them further may
    be far too long. On the first batch it finds the order of magnitude, since one gradient serves
    any number of trials.

    If the outputs move though the weights hardly do, one trial takes `AHEAD` times the LR that
    seems to be allowed. After the smallest step, a norm scales a token of zeros to its full length,
    and larger steps move it no further. Outputs that level off like this, below their radius, say
    nothing about the LR.

    That the step of a well-chosen LR moves what the model computes by a set amount, whatever its
    width, is the condition of maximal-update parametrisation (Yang et al., "Tensor Programs V",
    2022, arXiv 2203.03466); here it is measured instead of derived. Unlike a range test (Smith,
    arXiv 1506.01186) it does not wait for the loss to fall, which in a fine-tuning can take longer
    than any search may last.

    Args:
        set_lr: the highest peak LR of all parameter groups, as the user set it, > 0.
        passes: of the run over its data, where that matters; less than one counts as one.
        steps: of the run, where that matters.
        new_layers: layers of a new model; `None` for one that was trained before.

    Raises:
        ValueError: the LR, the passes or the steps are not a number, or not > 0.
    """

    def __init__(
        self,
        set_lr: float,
        passes: float = 1.0,
        steps: int = SHORT_RUN,
        new_layers: int | None = None,
    ) -> None:
        for name, value in (("set_lr", set_lr), ("passes", passes), ("steps", steps)):
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"`{name}` must be a number > 0, got {value!r}.")
        self.set_lr = set_lr
        self.passes = max(1.0, passes)
        self.steps = steps
        self.new_layers = new_layers
        self.trials: list[Trial] = []

    @property
    def next_lr(self) -> float:
        """LR of the next trial."""
        if not self.trials:
            return _bounded(self.set_lr * FIRST_SCALE)
        last = self.trials[-1]
        if self._is_to_look_ahead:
            return self._ahead
        if not last.is_near:
            return _bounded(last.learning_rate * _step_towards(last))
        if not self._answers:
            # Either it began too near to tell, or rounding hides what smaller steps do.
            smallest = min(trial.learning_rate for trial in self.trials)
            began_near = smallest > last.learning_rate / SMALL
            factor = 1.0 / (SMALL * NEAR) if began_near else NEAR
            return _bounded(last.learning_rate * factor)
        return _bounded(TRIAL_SHARE * _allowed(self._trusted or [last], 1.0)[0])

    @property
    def batch_is_done(self) -> bool:
        """Whether the next trial should be taken on another batch."""
        near = bool(self.trials) and self.trials[-1].is_near
        return near and self._answers and not self._is_to_look_ahead

    @property
    def is_done(self) -> bool:
        """Whether the search has ended."""
        enough = len(self._trusted) >= TRUSTED or len(self.trials) >= MOST_TRIALS
        return enough or self.levels_off

    @property
    def learning_rate(self) -> float | None:
        """The LR found; `None` before the search has ended, and where nothing was found."""
        if len(self._trusted) < TRUSTED or self.levels_off:
            return None
        return _bounded(_allowed(self._trusted, self._reach)[0] * self._length_factor)

    @property
    def factor(self) -> float:
        """What the LR is multiplied by that moves a model to its radius."""
        if not self._trusted:
            return 1.0
        at_radius = _allowed(self._trusted, 1.0)[0]
        return self._length_factor * _allowed(self._trusted, self._reach)[0] / at_radius

    @property
    def factor_for(self) -> str | None:
        """What that factor is for; `None` if it is about 1."""
        if f"{self.factor:.2g}" == "1":
            return None
        return "the length of the run" if self.new_layers is None else "the layers of a new model"

    @property
    def failed(self) -> bool:
        """Whether the search ended without an LR, so that the one that was set stands."""
        return self.is_done and self.learning_rate is None

    @property
    def levels_off(self) -> bool:
        """Whether the outputs jump in the smallest step, and larger ones move them no further."""
        return any(
            t.learning_rate >= self._ahead and t.movement < OUTPUT_RADIUS for t in self.trials
        )

    @property
    def limited_by(self) -> str | None:
        """What limits the LR found: `outputs` or `weights`."""
        return None if self.learning_rate is None else _allowed(self._trusted, self._reach)[1]

    def add(self, trial: Trial) -> None:
        """Add a trial that was taken at `next_lr`."""
        self.trials.append(trial)

    @property
    def _ahead(self) -> float:
        """LR that would show that the outputs level off; infinite where nothing suggests it."""
        hardly = (t for t in self.trials if t.is_near and 0.0 < t.weight_movement < HARDLY)
        first = next(hardly, None)
        return math.inf if first is None else _bounded(AHEAD * _allowed([first], 1.0)[0])

    @property
    def _is_to_look_ahead(self) -> bool:
        tried = max((trial.learning_rate for trial in self.trials), default=0.0)
        return tried < self._ahead < math.inf

    @property
    def _reach(self) -> float:
        """Factor on the outputs' radius."""
        return max(1.0, (self.new_layers or 0) / LAYERS)

    @property
    def _length_factor(self) -> float:
        share = min(1.0, self.steps / SHORT_RUN)
        return float(self.passes**-PASSES_EXPONENT * share**-STEPS_EXPONENT)

    @property
    def _trusted(self) -> list[Trial]:
        return deciding(self.trials) if self._answers else []

    @property
    def _answers(self) -> bool:
        """Whether a much smaller LR was seen to move the outputs much less."""
        near = [trial for trial in self.trials if trial.is_near]
        return any(
            small.movement <= big.movement / NEAR
            for big in near
            for small in self.trials
            if small.learning_rate <= big.learning_rate / SMALL
        )

    def state_dict(self) -> StateDict:
        """Return all that later decisions depend on, as JSON."""
        return {
            "set_lr": self.set_lr,
            "passes": self.passes,
            "steps": self.steps,
            "new_layers": self.new_layers,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from `state_dict()`; nothing is changed if this raises.

        Raises:
            StateError: the state is damaged.
        """
        set_lr = field(state, "set_lr", _positive)
        passes = field(state, "passes", _at_least_one)
        steps = field(state, "steps", from_one)
        new_layers = field(state, "new_layers", optional(integer))
        trials = field(state, "trials", list_of(trial_from_json))
        if len(trials) > MOST_TRIALS:
            raise StateError(f"`trials` must be at most {MOST_TRIALS}, got {len(trials)}.")
        self.set_lr, self.passes, self.steps, self.trials = set_lr, passes, steps, trials
        self.new_layers = new_layers


def trial_from_json(value: object, name: str) -> Trial:
    """Rebuild a trial from a mapping of its attributes.

    Raises:
        StateError: an attribute is missing or of another type.
    """
    return dataclass_of(
        Trial, value, learning_rate=_positive, movement=_movement, weight_movement=_movement
    )


def outcome_from_json(value: object, name: str) -> Outcome:
    """Rebuild an outcome from a mapping of its attributes.

    Raises:
        StateError: an attribute is missing or of another type.
    """
    return dataclass_of(Outcome, value, set_lr=_positive, learning_rate=_positive, factor=_positive)


def finite_movement(movement: float) -> float:
    """Return a movement with `NOT_FINITE` in place of NaN and infinity."""
    return movement if movement < NOT_FINITE else NOT_FINITE  # NaN is below nothing


def _step_towards(trial: Trial) -> float:
    """Return the factor on a trial's LR that should bring the next one where trials aim at."""
    if trial.movement >= NOT_FINITE or trial.weight_movement >= NOT_FINITE:
        return 1.0 / RETREAT  # how far such a step went says nothing of how far is too far
    if trial.is_silent:
        # Rounding hides small movements: trust only that it was too small.
        aim = TRIAL_SHARE * OUTPUT_RADIUS
        return GROWTH if trial.movement <= 0.0 else min(GROWTH, max(NEAR, aim / trial.movement))
    return min(GROWTH, max(TRIAL_SHARE / trial.share, 1.0 / RETREAT))


def _allowed(trials: Sequence[Trial], reach: float) -> tuple[float, str]:
    """Return the LR that keeps both movements within their radii, and which of them limits it.

    Args:
        trials: those that decide.
        reach: factor on the outputs' radius.
    """

    def slope(movements: Sequence[float]) -> float:
        slopes = (m / t.learning_rate for m, t in zip(movements, trials, strict=True))
        return math.hypot(*slopes) / math.sqrt(len(trials))

    outputs = slope([trial.movement for trial in trials]) / (OUTPUT_RADIUS * reach)
    weights = slope([trial.weight_movement for trial in trials]) / WEIGHT_RADIUS
    if outputs >= weights:
        return 1.0 / outputs, "outputs"
    return 1.0 / weights, "weights"


def _bounded(learning_rate: float) -> float:
    return min(max(learning_rate, LOWEST_LR), HIGHEST_LR)


def _positive(value: object, name: str) -> float:
    result = number(value, name)
    if result <= 0.0:
        raise StateError(f"`{name}` must be a number > 0, got {result}.")
    return result


def _at_least_one(value: object, name: str) -> float:
    result = number(value, name)
    if result < 1.0:
        raise StateError(f"`{name}` must be at least 1, got {result}.")
    return result


def _movement(value: object, name: str) -> float:
    result = number(value, name)
    if not 0.0 <= result <= NOT_FINITE:
        raise StateError(f"`{name}` must be in [0, {NOT_FINITE:g}], got {result}.")
    return result
