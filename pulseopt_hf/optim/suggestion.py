"""The learning rate that a calibration suggests, asked for without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pulseopt_hf.aees.calibration import MOST_TRIALS, Trial, not_calibrated
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim.calibrator import Calibrator, why_not_calibrate
from pulseopt_hf.optim.kept_model import kept_model
from pulseopt_hf.optim.loop import AEES
from pulseopt_hf.optim.randomness import kept_random_state
from pulseopt_hf.optim.unwrap import all_parameters, device_of, innermost


@dataclass(frozen=True)
class Suggestion:
    """What `find_learning_rate` found.

    Attributes:
        learning_rate: the LR to train with, or the LR that was set if nothing was found.
        limited_by: why it is not higher: one step would move the `outputs`, which are what the
            model computes, or the `weights` too far. `None` if nothing was found.
        trials: the trial steps, see `Trial`.
        set_lr: the LR that was set.
        reason: why nothing was found, or `None`.
        factor: what the LR at the limit was multiplied by.
        factor_for: what for, or `None` if the factor is about 1.
        replayed_rows: rows of the forward passes without gradient that measured the trials.
    """

    learning_rate: float
    limited_by: str | None
    trials: list[Trial]
    set_lr: float
    reason: str | None = None
    factor: float = 1.0
    factor_for: str | None = None
    replayed_rows: int = 0

    @classmethod
    def of(cls, calibrator: Calibrator) -> Suggestion:
        """Take the result of a calibration that has ended."""
        search, outcome = calibrator.search, calibrator.outcome
        rows = calibrator.probe.replayed_rows
        if outcome is None:
            reason = "the data ended before the search did"
            return cls(search.set_lr, None, search.trials, search.set_lr, reason, 1.0, None, rows)
        return cls(
            outcome.learning_rate,
            outcome.limited_by,
            search.trials,
            search.set_lr,
            outcome.reason,
            outcome.factor,
            outcome.factor_for,
            rows,
        )

    def plot(self) -> Any:
        """Return the report's chart of the trials, an Altair chart.

        Raises:
            ImportError: the extra `report` is not installed.
        """
        from pulseopt_hf.report.run_charts import trials_plot

        found = self.learning_rate, self.limited_by, self.set_lr, self.factor
        return trials_plot(self.trials, *found).altair_chart()


def suggest(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    passes: float,
    max_steps: int | None,
) -> Suggestion:
    """Find the LR for a loop of one's own; see `pulseopt_hf.find_learning_rate`."""
    reason = why_not_calibrate(optimizer, PulseOptConfig(calibration="trust_region"))
    if reason is not None:
        raise ValueError(not_calibrated(reason))
    parameters = list(all_parameters(optimizer))
    aees = AEES(optimizer)
    calibrator = aees.calibrate(model, None, max_steps, passes, only_ask=True)
    try:
        with kept_random_state(device_of(innermost(optimizer))), kept_model(model, parameters):
            model.train()
            for step, batch in enumerate(_again_and_again(batches, MOST_TRIALS + 1)):
                if calibrator.is_done:
                    break
                for parameter in parameters:
                    parameter.grad = None
                aees.step_start(step)
                value = loss(model, batch)
                value.backward()  # type: ignore[no-untyped-call]
                aees.step_end(value)
    finally:
        aees.remove()
    return Suggestion.of(calibrator)


def _again_and_again(batches: Iterable[Any], most: int) -> Iterator[Any]:
    """Yield batches from the beginning again where there are fewer than are needed."""
    count = 0
    while count < most:
        before = count
        for batch in batches:
            yield batch
            count += 1
            if count == most:
                return
        if count == before:
            return
