"""What the loss does while the LR rises to what a calibration found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pulseopt_hf.aees.calibration import NOT_FINITE
from pulseopt_hf.aees.json_checks import (
    StateDict,
    StateError,
    field,
    flag,
    integer,
    later_field,
    list_of,
    number,
)
from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.losses import LossBuffer, has_risen

SHORTEST_WATCH = 20  # optimizer steps, at least
LONGEST_WATCH = 0.05  # share of the run that the LR rises in, at most


class LossWatch:
    """Compares the losses of the first steps at the LR found with those at the origin.

    Args:
        optimizer: the innermost optimizer.
        peaks: what the LR of each of its groups rises to.
        max_steps: optimizer steps of the run, or `None` where that is not known.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, peaks: Sequence[float], max_steps: int | None
    ) -> None:
        self._optimizer = optimizer
        pairs = zip(optimizer.param_groups, peaks, strict=True)
        self._warms_up = any(float(group["lr"]) < peak * (1 - 1e-6) for group, peak in pairs)
        self._longest = max(SHORTEST_WATCH, int(LONGEST_WATCH * (max_steps or 0)))
        self._losses = LossBuffer()
        self._at_origin = 0  # how many of them
        self._last_lr = 0.0  # base LR in the step before
        self._rose = 0  # steps that the schedule's warm-up went on for
        self.steps = 0  # since the LR was set

    @property
    def ramp(self) -> float:
        """Factor on the base LR in the step that runs.

        A warm-up of the schedule gets the steps back that passed at the origin.
        """
        step = self.steps + 1
        if not self._warms_up:
            return min(1.0, step / self._longest)
        rose = self._rose + (self._rose == self.steps and self._lr > self._last_lr)
        return min(1.0, step / (rose + self._at_origin))

    @property
    def _lr(self) -> float:
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    def add_origin(self, loss: float | Tensor) -> None:
        """Note the loss of a step at the origin, shape ()."""
        self._losses.append(loss)
        self._at_origin = len(self._losses)

    def add(self, loss: float | Tensor | None) -> bool:
        """Note the loss of a step after it, and return whether the watch is over.

        Args:
            loss: shape (), or `None` for a step that did not happen.
        """
        if loss is not None:
            self._losses.append(loss)
        rises, self._last_lr = self._lr > self._last_lr, self._lr
        self._rose += rises and self._rose == self.steps
        self.steps += 1
        is_warm = self._warms_up and self.steps >= SHORTEST_WATCH and not rises
        return is_warm or self.steps >= self._longest

    def agree(self, agreement: Agreement) -> None:
        """Average the losses over ranks; every rank must call it."""
        self._losses.agree(agreement)
        agreed = self._losses.agreed
        self._losses.restore(loss if abs(loss) < NOT_FINITE else NOT_FINITE for loss in agreed)

    @property
    def has_risen(self) -> bool:
        """Whether the loss lies above the origin's by more than both scatter, as ranks agreed."""
        losses = self._losses.agreed
        return has_risen(losses[: self._at_origin], losses[self._at_origin :])

    def state_dict(self) -> StateDict:
        """Return what was seen, as JSON; `agree` comes before it."""
        return {
            "losses": list(self._losses.agreed),
            "at_origin": self._at_origin,
            "watched": self.steps,
            "last_lr": self._last_lr,
            "rose": self._rose,
            "longest": self._longest,
            "warms_up": self._warms_up,
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from `state_dict()`; nothing is changed if this raises.

        Raises:
            StateError: the state is damaged.
        """
        losses = field(state, "losses", list_of(number))
        at_origin = field(state, "at_origin", integer)
        steps = field(state, "watched", integer)
        last_lr = field(state, "last_lr", number)
        rose = later_field(state, "rose", integer, before=steps)
        longest = field(state, "longest", integer)
        warms_up = field(state, "warms_up", flag)
        if longest < SHORTEST_WATCH:
            raise StateError(f"`longest` must be at least {SHORTEST_WATCH}, got {longest}.")
        if at_origin > len(losses):
            raise StateError(f"`at_origin` is {at_origin}, and there are {len(losses)} losses.")
        self._losses = LossBuffer()
        self._losses.restore(losses)
        self._at_origin, self.steps = at_origin, steps
        self._last_lr, self._rose = last_lr, rose
        self._longest, self._warms_up = longest, warms_up
