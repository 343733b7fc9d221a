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
        self.steps = 0  # since the LR was set

    @property
    def ramp(self) -> float:
        """Factor on the base LR in the step that runs; 1 where the schedule has a warm-up."""
        return 1.0 if self._warms_up else min(1.0, (self.steps + 1) / self._longest)

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
        self.steps += 1
        return self.steps >= self._longest or (self._warms_up and self._is_warm())

    def _is_warm(self) -> bool:
        """Whether the schedule's warm-up is over, and the watch was long enough."""
        now = max(float(group["lr"]) for group in self._optimizer.param_groups)
        rises, self._last_lr = now > self._last_lr > 0.0, now
        return self.steps >= SHORTEST_WATCH and not rises

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
        longest = field(state, "longest", integer)
        warms_up = field(state, "warms_up", flag)
        if longest < SHORTEST_WATCH:
            raise StateError(f"`longest` must be at least {SHORTEST_WATCH}, got {longest}.")
        if at_origin > len(losses):
            raise StateError(f"`at_origin` is {at_origin}, and there are {len(losses)} losses.")
        self._losses = LossBuffer()
        self._losses.restore(losses)
        self._at_origin, self.steps, self._last_lr = at_origin, steps, last_lr
        self._longest, self._warms_up = longest, warms_up
