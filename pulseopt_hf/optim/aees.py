"""AEES for hand-written training loops, and the engine under the Trainer floor."""

from __future__ import annotations

import functools
import logging
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pulseopt_hf.aees import Arm, Controller, EpisodeRecord
from pulseopt_hf.aees.calibration import not_calibrated
from pulseopt_hf.aees.state import StateDict, field, integer, number, optional
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import base_lr
from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.calibrator import Calibrator, StepFate, why_not_calibrate
from pulseopt_hf.optim.divergence import SKIPS, DivergenceGuard
from pulseopt_hf.optim.episodes import Episodes
from pulseopt_hf.optim.hooks import ArmHooks, check_optimizer
from pulseopt_hf.optim.noise import GradientNoise, all_parameters
from pulseopt_hf.optim.unwrap import (
    accumulates,
    device_of,
    has_scaler,
    innermost,
    is_stepped_by_deepspeed,
)
from pulseopt_hf.optim.update_norm import UpdateNorm

logger = logging.getLogger("pulseopt_hf")


class Scheduler(Protocol):
    """What AEES asks of a learning-rate scheduler."""

    def step(self) -> Any:
        """Advance the base LR by one optimizer step."""


class AEES:
    """Adaptive Episodic Exploration Scheduling round a torch optimizer.

    Training is cut into episodes of `episode_length` optimizer steps. Each runs with one arm, a
    learning-rate multiplier and a gradient-noise level, and is rewarded by how far the loss fell;
    a bandit chooses the next. The method and the defaults are those of the PyPI package
    `pulseopt`, whose `AEES` this replaces without a change to the loop:

        aees = AEES(optimizer, lr_candidates=[0.5, 1.0, 2.0], lr_scheduler=scheduler, seed=0)
        for step, batch in enumerate(batches):
            aees.step_start(step)
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            aees.step_end(loss)  # steps the optimizer and the scheduler
        aees.finalize()

    Under Accelerate, pass the prepared optimizer and scheduler: while gradients accumulate,
    `step_end` only notes the loss, and an optimizer step counts the mean of its micro-batches.
    Under `torch.distributed` all ranks run the arms that rank 0 chooses by the mean loss.

    Args:
        optimizer: the optimizer, wrapped by Accelerate or not.
        lr_candidates: see `PulseOptConfig`, as for all arguments not explained here.
        noise_candidates: see `PulseOptConfig`.
        episode_length: optimizer steps in an episode, >= 1.
        lr_scheduler: stepped after every optimizer step, if given.
        control_mode: see `PulseOptConfig`.
        structured_control_mode: see `PulseOptConfig`.
        context_mode: see `PulseOptConfig`.
        context_trend_window: see `PulseOptConfig`.
        context_trend_epsilon: see `PulseOptConfig`.
        reward_instability_lambda: see `PulseOptConfig`.
        reward_epsilon: see `PulseOptConfig`.
        reward_clip_min: see `PulseOptConfig`.
        reward_clip_max: see `PulseOptConfig`.
        ema_alpha: see `PulseOptConfig`.
        seed: see `PulseOptConfig`.
        noise_mode: see `PulseOptConfig`.
        bandit: see `PulseOptConfig`.
        reward: see `PulseOptConfig`.
        calibration: see `PulseOptConfig`; it needs `model`.
        model: the model as the loop calls it, for the calibration, which replays its first calls.
        passes: of the loop over its data, for the calibration, > 0. Several lower the LR of a
            pretrained model.
        nonfinite: `raise` as published, or `skip` to leave out the step, on all ranks alike. Both
            read each loss from the device.
        max_consecutive_skips: see `PulseOptConfig`.
        divergence: see `PulseOptConfig`. Resumed amid an episode, `rollback` goes back to where it
            was resumed, since `state_dict` holds no parameters.
        divergence_factor: see `PulseOptConfig`.
        log_update_norm: see `PulseOptConfig`.
        distributed: whether ranks agree, where `torch.distributed` runs; `False` leaves each to
            itself.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
        ValueError: a knob is out of range, or the optimizer cannot run under an arm.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        lr_candidates: Sequence[float] = (1.0,),
        noise_candidates: Sequence[float] = (0.0,),
        episode_length: int = 100,
        lr_scheduler: Scheduler | None = None,
        control_mode: str = "adaptive",
        structured_control_mode: str = "independent",
        context_mode: str = "none",
        context_trend_window: int = 3,
        context_trend_epsilon: float = 1e-3,
        reward_instability_lambda: float = 0.0,
        reward_epsilon: float = 1e-8,
        reward_clip_min: float = -1.0,
        reward_clip_max: float = 1.0,
        ema_alpha: float = 0.1,
        seed: int | None = None,
        noise_mode: str = "absolute",
        bandit: str = "discounted_ucb",
        reward: str = "smoothed",
        calibration: str = "off",
        nonfinite: str = "raise",
        max_consecutive_skips: int = 50,
        divergence: str = "off",
        divergence_factor: float = 2.0,
        log_update_norm: bool = False,
        model: nn.Module | None = None,
        passes: float = 1.0,
        distributed: bool = True,
    ) -> None:
        settings: dict[str, Any] = {
            "lr_candidates": lr_candidates,
            "noise_candidates": noise_candidates,
            "episode_length": episode_length,
            "control_mode": control_mode,
            "structured_control_mode": structured_control_mode,
            "context_mode": context_mode,
            "context_trend_window": context_trend_window,
            "context_trend_epsilon": context_trend_epsilon,
            "reward_instability_lambda": reward_instability_lambda,
            "reward_epsilon": reward_epsilon,
            "reward_clip_min": reward_clip_min,
            "reward_clip_max": reward_clip_max,
            "ema_alpha": ema_alpha,
            "seed": seed,
            "noise_mode": noise_mode,
            "bandit": bandit,
            "reward": reward,
            "calibration": calibration,
            "nonfinite": nonfinite,
            "max_consecutive_skips": max_consecutive_skips,
            "divergence": divergence,
            "divergence_factor": divergence_factor,
            "log_update_norm": log_update_norm,
        }
        if is_stepped_by_deepspeed(optimizer):
            raise ValueError(
                "DeepSpeed steps the optimizer inside `accelerator.backward`, before `step_end` "
                "could. Train with PulseOptTrainer, or prepare the loop with DDP or FSDP2."
            )
        config = PulseOptConfig(**settings)
        if config.calibration != "off" and model is None:
            raise ValueError(
                f"`calibration` must be 'off' without a model, got {calibration!r}. Pass `model`, "
                "whose first calls it replays."
            )
        self._set_up(optimizer, config, lr_scheduler, distributed)
        if config.calibration != "off" and model is not None:
            reason = why_not_calibrate(optimizer, config)
            if reason is not None:
                logger.warning(not_calibrated(reason))
            else:
                self.calibrate(model, lr_scheduler, passes=passes)

    @classmethod
    def from_config(
        cls,
        optimizer: torch.optim.Optimizer,
        config: PulseOptConfig,
        *,
        lr_scheduler: Scheduler | None = None,
        distributed: bool = True,
        shard: int = 0,
        buffers: Iterable[Tensor] = (),
    ) -> AEES:
        """Create from a config instead of single knobs; its `episode_length` must be set.

        `shard` is for loops round an engine; see `ArmHooks`. `buffers` are the model's, which a
        rollback has to put back too.
        """
        self = cls.__new__(cls)
        self._set_up(optimizer, config, lr_scheduler, distributed, shard, buffers)
        return self

    def _set_up(
        self,
        optimizer: torch.optim.Optimizer,
        config: PulseOptConfig,
        lr_scheduler: Scheduler | None,
        distributed: bool,
        shard: int = 0,
        buffers: Iterable[Tensor] = (),
    ) -> None:
        if config.episode_length is None:
            raise ValueError(
                "`episode_length` must be a whole number >= 1 here, got None: a loop of one's own "
                "has no length that it could follow from."
            )
        self.optimizer = optimizer
        self.config = config
        self.episode_length: int = config.episode_length
        self.current_candidate: Arm | None = None
        self.calibrator: Calibrator | None = None
        self.ramp = 1.0  # of the last step, while the LR rises to what a calibration found
        self.optimizer_steps = 0  # that happened; the noise is a function of it
        self.skipped_steps = 0
        self._consecutive_skips = 0
        self._scheduler = lr_scheduler
        self._forget_micro_batches()
        self._global_step = 0  # of the step that is open
        inner = innermost(optimizer)
        check_optimizer(inner)
        self._agreement = Agreement(device_of(inner), enabled=distributed)
        seed = secrets.randbits(32) if config.seed is None else config.seed
        self._noise = GradientNoise(seed, config.noise_mode)
        self._update_norm = None
        if config.log_update_norm:
            self._update_norm = UpdateNorm(all_parameters(inner))
        self._hooks = ArmHooks(inner, self._noise, self._update_norm, shard)
        self.divergence: DivergenceGuard | None = None
        if config.divergence != "off":
            self.divergence = DivergenceGuard(inner, config, buffers)
        self._episodes = Episodes(
            config,
            self._agreement,
            self.divergence,
            self._update_norm,
            self._hooks.read_learning_rate,
            functools.partial(base_lr.share_of_peak, inner),
        )

    def calibrate(
        self,
        model: nn.Module,
        scheduler: Any,
        max_steps: int | None = None,
        passes: float = 1.0,
        *,
        only_ask: bool = False,
    ) -> Calibrator:
        """Begin a calibration in the next optimizer step, before any episode; see `Calibrator`."""
        self.calibrator = Calibrator(
            self.optimizer,
            model,
            scheduler,
            self._hooks,
            self._agreement,
            max_steps,
            passes,
            only_ask=only_ask,
        )
        return self.calibrator

    @property
    def is_calibrating(self) -> bool:
        """Whether episodes wait for a calibration to end."""
        return self.calibrator is not None and not self.calibrator.is_done

    @property
    def is_calibrated(self) -> bool:
        """Whether the peak of the base LR is what a calibration has found."""
        outcome = None if self.calibrator is None else self.calibrator.outcome
        return outcome is not None and outcome.reason is None

    @property
    def controller(self) -> Controller:
        """What chooses the arms and records the episodes."""
        return self._episodes.controller

    def step_start(self, global_step: int) -> Arm:
        """Begin an optimizer step, or a micro-batch of one; opens an episode where none is open.

        Args:
            global_step: number of the step in the run, >= 0; it only goes into the record.

        Returns:
            The arm that the step will run under, which is `current_candidate` until `step_end`.

        Raises:
            ValueError: `global_step` is not a whole number >= 0.
            RuntimeError: the step before was not ended.
        """
        if isinstance(global_step, bool) or not isinstance(global_step, int) or global_step < 0:
            raise ValueError(f"`global_step` must be a whole number >= 0, got {global_step!r}.")
        if self.current_candidate is not None:
            raise RuntimeError("`step_start` was called twice; end the open step with `step_end`.")
        self._global_step = global_step
        if self.calibrator is not None and self.is_calibrating:
            self.current_candidate = Arm.of(self.calibrator.ramp, 0.0)
            return self.current_candidate
        if not self._episodes.is_open:
            self._noise.seed = self._episodes.open(
                global_step, self._noise.seed, calibrated=self.is_calibrated
            )
        assert self.controller.episode is not None
        self.current_candidate = self.controller.episode.arm
        return self.current_candidate

    def step_end(self, loss: float | Tensor) -> None:
        """End a step: step the optimizer under the arm and the scheduler after it.

        Args:
            loss: the loss that was back-propagated, shape (), before any division for gradient
                accumulation.

        Raises:
            RuntimeError: `step_start` was not called before, or too many steps were skipped in a
                row.
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
        # A gradient scaler has to be stepped to skip: it finds the overflow and lowers its scale.
        if (finite or has_scaler(self.optimizer)) and self.apply(self.optimizer.step):
            self.record(losses[0] if len(losses) == 1 else sum(losses) / len(losses))
            if self._scheduler is not None:
                self._scheduler.step()
        else:
            self.skip()

    def finalize(self) -> None:
        """Close a partial episode. Safe to call again; a later `step_start` opens a new one."""
        self.abandon()
        self._episodes.finish(self._global_step)

    def get_logs(self) -> dict[str, list[Any]]:
        """Return the closed episodes, one item each under the log keys of `pulseopt`.

        `mean_update_norms` holds `None` unless `log_update_norm` is on; `context_buckets` is there
        where a context is in use, and `calibration_trials` where the LR is calibrated (as `Trial`
        describes them). Losses are means over ranks. Of more than 5,119 episodes it has the newest
        1,024 at least, and some of those before.
        """
        logs = self.controller.logs()
        if self.calibrator is not None:
            trials = self.calibrator.search.trials
            logs["calibration_trials"] = [asdict(trial) for trial in trials]
        return logs

    def apply(self, step: Callable[[], object]) -> bool:
        """Run `step`, which steps the optimizer, under the open step's arm.

        Part of `step_end`, for loops that step the optimizer themselves; followed by `record` or
        `skip`.

        Returns:
            Whether the step happened, be it for trials; a gradient scaler may have decided not to.
        """
        arm = self._require_open_step()
        if self.calibrator is not None and self.calibrator.is_searching:
            fate = self.calibrator.run(step, self._global_step)
            if fate is not StepFate.READY:
                return fate is StepFate.USED
            arm = Arm.of(self.calibrator.ramp, 0.0)
        self.ramp = arm.lr_multiplier if self.is_calibrating else 1.0
        with self._hooks.applied(arm, self.optimizer_steps) as outcome:
            step()
        happened = outcome.happened
        if outcome.fired and not happened and self._update_norm is not None:
            self._update_norm.discard_last()
        return happened

    def record(self, loss: float | Tensor) -> EpisodeRecord | None:
        """Count the open step, which happened, and end it. Reads the device once an episode.

        Args:
            loss: its step loss, shape ().

        Returns:
            The episode's record if this was its last step.
        """
        self._require_open_step()
        self.optimizer_steps += 1
        self._consecutive_skips = 0
        self.current_candidate = None
        if self.calibrator is not None and self.is_calibrating:
            self.calibrator.observe(loss, self._global_step)
            return None
        # The step in which a calibration ended belongs to no episode.
        return self._episodes.count(loss, self._global_step) if self._episodes.is_open else None

    def skip(self) -> None:
        """End the open step, which did not happen: the episode neither counts nor sees it.

        Raises:
            RuntimeError: `max_consecutive_skips` steps in a row were skipped.
        """
        self._require_open_step()
        self.skipped_steps += 1
        self._consecutive_skips += 1
        where = self._where()
        self.current_candidate = None
        if self.calibrator is not None:
            self.calibrator.observe(None, self._global_step)
        # A gradient scaler looks for its scale by skipping; that says nothing about the arm.
        if self._consecutive_skips % SKIPS == 0 and not has_scaler(self.optimizer):
            self._episodes.cut(self._global_step)
        if self._consecutive_skips >= self.config.max_consecutive_skips:
            raise RuntimeError(
                f"{self._consecutive_skips} optimizer steps in a row were skipped because of "
                f"non-finite losses or gradients, the last at {where}. Lower the learning rate or "
                "look into the data; `max_consecutive_skips` sets how many are borne."
            )

    def any_rank(self, value: bool) -> bool:
        """Return whether `value` is true on any rank; every rank must call it. One all-reduce."""
        return self._agreement.any(value)

    def abandon(self) -> None:
        """Forget the open step, which will not be taken, and the micro-batches it had."""
        self.current_candidate = None
        self._forget_micro_batches()

    def agree(self) -> None:
        """Average what this episode has seen so far over ranks; every rank must call it.

        Afterwards `state_dict` sends nothing and can be called on one rank alone.
        """
        self._episodes.agree(self._global_step)
        if self.calibrator is not None:
            self.calibrator.agree()

    @property
    def learning_rate(self) -> float | None:
        """Effective LR of the first parameter group in the last step, or `None` before it.

        Reads the device where the LR is a tensor.
        """
        return self._hooks.read_learning_rate()

    def remove(self) -> None:
        """Take all hooks off, for another controller to put on its own."""
        self._hooks.remove()
        if self.calibrator is not None:
            self.calibrator.close()

    def state_dict(self) -> StateDict:
        """Return everything that later arms depend on, as JSON, also amid an episode.

        Under `torch.distributed` every rank must call it, unless `agree` was called before.
        """
        self.agree()
        calibration = None if self.calibrator is None else self.calibrator.state_dict()
        return {
            **self._episodes.state_dict(),
            "calibration": calibration,
            "optimizer_steps": self.optimizer_steps,
            "skipped_steps": self.skipped_steps,
            "consecutive_skips": self._consecutive_skips,
            "noise_seed": self._noise.seed,
            "learning_rate": self.learning_rate,
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from `state_dict()`; nothing is changed if this raises.

        Raises:
            StateError: the state is damaged, of another version, or of other settings, which the
                message names with both values.
        """
        steps = field(state, "optimizer_steps", integer)
        skipped = field(state, "skipped_steps", integer)
        consecutive = field(state, "consecutive_skips", integer)
        noise_seed = field(state, "noise_seed", integer)
        go_on = self._episodes.prepare(state)
        saved = state if isinstance(state, Mapping) else {}  # `field` refuses all else
        learning_rate = optional(number)(saved.get("learning_rate"), "learning_rate")
        calibration = saved.get("calibration")
        if self.calibrator is not None and calibration is not None:
            self.calibrator.load_state_dict(calibration)
        elif self.calibrator is not None:  # what was begun without is not calibrated midway
            self.calibrator.close()
            self.calibrator = None
        go_on()
        self.abandon()
        self.optimizer_steps = steps
        self.skipped_steps = skipped
        self._consecutive_skips = consecutive
        self._noise.seed = noise_seed
        self._hooks.learning_rate = learning_rate

    def _forget_micro_batches(self) -> None:
        self._micro_batches: list[float | Tensor] = []
        self._step_is_finite = True

    def _require_open_step(self) -> Arm:
        if self.current_candidate is None:
            raise RuntimeError("No step is open; call `step_start` before `step_end`.")
        return self.current_candidate

    def _where(self) -> str:
        return f"global step {self._global_step}"
