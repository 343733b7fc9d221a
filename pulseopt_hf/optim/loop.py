"""AEES for hand-written training loops."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pulseopt_hf.aees.calibration import not_calibrated
from pulseopt_hf.config import PulseOptConfig, takes_knobs
from pulseopt_hf.optim.calibrator import why_not_calibrate
from pulseopt_hf.optim.steps import EpisodicSteps
from pulseopt_hf.optim.unwrap import accumulates, is_stepped_by_deepspeed

logger = logging.getLogger("pulseopt_hf")


class Scheduler(Protocol):
    """What AEES asks of a learning-rate scheduler."""

    def step(self) -> Any:
        """Advance the base LR by one optimizer step."""


_DEFAULTS = PulseOptConfig.published(nonfinite="raise")


@takes_knobs(_DEFAULTS)
class AEES(EpisodicSteps):
    """Adaptive Episodic Exploration Scheduling for a torch optimizer.

    Training is cut into episodes of `episode_length` optimizer steps. Each episode runs with one
    arm: a learning-rate multiplier and a gradient-noise level. Its reward is how far the loss fell,
    and a bandit chooses the next arm. The method and the defaults are those of the PyPI package
    `pulseopt`, and its loops run without a change:

        aees = AEES(optimizer, lr_candidates=[0.5, 1.0, 2.0], lr_scheduler=scheduler, seed=0)
        for step, batch in enumerate(batches):
            aees.step_start(step)
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            aees.step_end(loss)  # steps the optimizer and the scheduler
        aees.finalize()

    Under Accelerate, pass the prepared optimizer and scheduler. While gradients accumulate,
    `step_end` only records the loss; an optimizer step has the mean loss of its micro-batches.
    Under `torch.distributed`, rank 0 chooses each arm from the mean loss, and all ranks run it.

    Args:
        optimizer: the optimizer, wrapped by Accelerate or not.
        lr_scheduler: stepped after every optimizer step, if given.
        model: the model as the loop calls it. Calibration needs it, and replays its first calls.
        passes: number of passes of the loop over its data, > 0. With several, calibration lowers
            the LR of a pretrained model with a new head.
        max_steps: optimizer steps of the loop, >= 1, if that is known. In a short run, calibration
            raises the LR of a pretrained model with a new head; in a long one, the rise to the LR
            found takes longer.
        distributed: whether ranks agree on arms under `torch.distributed`. `False` lets each rank
            decide by itself.
        **knobs: those of `PulseOptConfig`, with the defaults of `PulseOptConfig.published()` and
            `nonfinite="raise"`. `calibration` needs `model`. Whatever `nonfinite` is, each loss is
            read from the device. If you resume in the middle of an episode,
            `divergence="rollback"` goes back to where you resumed, because `state_dict` holds no
            parameters.

    Attributes:
        listeners: functions that are called with each new `NumberedTrial`, `Outcome` or
            `NumberedEpisode` of `pulseopt_hf.aees.record_format`.

    Raises:
        TypeError: `optimizer` is not a torch optimizer, or there is no such knob.
        ValueError: a knob is out of range, or the optimizer cannot run under an arm.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        lr_scheduler: Scheduler | None = None,
        model: nn.Module | None = None,
        passes: float = 1.0,
        max_steps: int | None = None,
        distributed: bool = True,
        **knobs: Any,
    ) -> None:
        if is_stepped_by_deepspeed(optimizer):
            raise ValueError(
                "DeepSpeed steps the optimizer inside `accelerator.backward`, before `step_end` "
                "could. Train with PulseOptTrainer, or prepare the loop with DDP or FSDP2."
            )
        config = dataclasses.replace(_DEFAULTS, **knobs)
        if config.calibration != "off" and model is None:
            raise ValueError(
                f"`calibration` must be 'off' without a model, got {config.calibration!r}. Pass "
                "`model`, whose first calls it replays."
            )
        self._set_up(optimizer, config, lr_scheduler, distributed=distributed)
        if config.calibration != "off" and model is not None:
            reason = why_not_calibrate(optimizer, config)
            if reason is not None:
                logger.warning(not_calibrated(reason))
            else:
                self.calibrate(model, lr_scheduler, max_steps, passes)

    @classmethod
    def from_config(
        cls,
        optimizer: torch.optim.Optimizer,
        config: PulseOptConfig,
        *,
        lr_scheduler: Scheduler | None = None,
        **engine: Any,
    ) -> AEES:
        """Create from a config instead of single knobs; its `episode_length` must be set.

        `engine` holds further arguments of `EpisodicSteps`, for a loop around an engine.
        """
        self = cls.__new__(cls)
        self._set_up(optimizer, config, lr_scheduler, **engine)
        return self

    def _set_up(
        self,
        optimizer: torch.optim.Optimizer,
        config: PulseOptConfig,
        lr_scheduler: Scheduler | None,
        **engine: Any,
    ) -> None:
        super().__init__(optimizer, config, **engine)
        self._scheduler = lr_scheduler
        self._forget_micro_batches()

    def step_end(self, loss: float | Tensor) -> None:
        """End a step: step the optimizer with the arm, then the scheduler.

        Args:
            loss: the loss of the backward pass, shape (), before any division for gradient
                accumulation.

        Raises:
            RuntimeError: `step_start` was not called, or too many steps were skipped in a row.
            ValueError: the loss is not finite and `nonfinite` is `raise`. The step stays open.
        """
        self._require_open_step()
        if isinstance(loss, Tensor):
            loss = loss.detach().clone()
        value = float(loss)
        if not math.isfinite(value):
            if self.config.nonfinite == "raise":
                raise ValueError(f"`loss` must be finite, got {value} at {self._where()}.")
            self._step_is_finite = False
        self._micro_batches.append(loss)
        if accumulates(self.optimizer):
            self.optimizer.step()  # Accelerate passes over it, but counts on being called
            self.current_candidate = None
            return
        losses, finite = self._micro_batches, self._step_is_finite
        self._forget_micro_batches()
        if self.config.nonfinite == "skip":
            finite = not self._agreement.any(not finite)
        happened = self.apply(self.optimizer.step, finite)
        self.settle(losses[0] if len(losses) == 1 else sum(losses) / len(losses))
        if happened and self._scheduler is not None:
            self._scheduler.step()

    def get_logs(self) -> dict[str, list[Any]]:
        """Return the closed episodes: under each log key of `pulseopt`, one item per episode.

        `mean_update_norms` holds `None` unless `log_update_norm` is on. `context_buckets` is only
        there with `context_mode`, and `calibration_trials` only with calibration; `Trial` describes
        its items. Losses are means over ranks. Beyond 5,119 episodes, the logs hold at least the
        newest 1,024 and a selection of the older ones.
        """
        logs = self.controller.logs()
        if self.calibrator is not None:
            trials = self.calibrator.search.trials
            logs["calibration_trials"] = [dataclasses.asdict(trial) for trial in trials]
        return logs

    def abandon(self) -> None:
        """Drop the open step, which will not be taken, and its micro-batches."""
        super().abandon()
        self._forget_micro_batches()

    def _forget_micro_batches(self) -> None:
        self._micro_batches: list[float | Tensor] = []
        self._step_is_finite = True
