"""One Trainer's connection to the method: what the mixin and the callback have in common."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from pulseopt_hf.aees.state import StateDict, field, integer
from pulseopt_hf.config import PulseOptConfig, PulseOptKnobs
from pulseopt_hf.optim import AEES
from pulseopt_hf.trainer import deepspeed
from pulseopt_hf.trainer.calibration import Calibrator
from pulseopt_hf.trainer.checkpoints import has_optimizer
from pulseopt_hf.trainer.deepspeed import DeepSpeedSteps
from pulseopt_hf.trainer.guard import NonFiniteGuard
from pulseopt_hf.trainer.patches import MethodPatches
from pulseopt_hf.trainer.record import RunRecorder
from pulseopt_hf.trainer.upstream import (
    checkpoint_folder,
    mark_engine_step_skipped,
    mark_step_skipped,
)

logger = logging.getLogger("pulseopt_hf")

SESSIONS: weakref.WeakSet[PulseSession] = weakref.WeakSet()


class PulseSession:
    """Runs episodes in a Trainer's loop.

    Whoever owns the session reports to it: the micro-batch losses as `training_step` returns
    them (`observe`), the start of each step, of training and of a save, and calls `optimizer_step`
    where Trainer steps the optimizer.

    Args:
        trainer: the Trainer, fully constructed.
        config: the knobs; `None` takes them from `trainer.args` where those have them, and else
            the recommended ones.

    Raises:
        ValueError: the knobs were given twice, or the Trainer's optimizer cannot be adapted.
    """

    def __init__(self, trainer: Trainer, config: PulseOptConfig | None) -> None:
        """See the class."""
        args = trainer.args
        if config is not None and isinstance(args, PulseOptKnobs):
            if PulseOptConfig.of_knobs(args) != PulseOptConfig():
                raise ValueError(
                    "The knobs were given twice: in the training arguments and in a "
                    "PulseOptConfig. Give them once."
                )
        # Upstream annotates `optimizer` and friends as what they are before training prepares them.
        self.trainer: Any = trainer
        # Where Trainer's loop steps the optimizer; PulseOptTrainer puts its seam here.
        self.seam: Callable[[], None] = self.optimizer_step
        self._config = config
        self._patches = MethodPatches()
        self._aees: AEES | None = None
        self._guard: NonFiniteGuard | None = None
        self._plain_step: Callable[[], object] | None = None
        self._loss: Tensor | None = None
        self._engine_stepped = False
        self._calibrator: Calibrator | None = None
        self._recorder: RunRecorder | None = None
        # The checkpoint that `train` was asked to resume from; whoever wraps `train` notes it.
        self.resumed_folder: Path | None = None
        self._check_engine()
        SESSIONS.add(self)

    def note_resume(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Note the folder that `train`, called with these arguments, resumes from."""
        folder: str | None = None
        if isinstance(resume_from_checkpoint, str | PathLike):
            folder = str(resume_from_checkpoint)
        elif resume_from_checkpoint:
            folder = get_last_checkpoint(self.trainer.args.output_dir)  # type: ignore[no-untyped-call]
        self.resumed_folder = None if folder is None else Path(folder)

    def begin(self, state: TrainerState, saved: object | None) -> None:
        """Start training: a fresh controller, or the one of the checkpoint that is resumed.

        Args:
            state: Trainer's state, `global_step` > 0 when resuming.
            saved: what `state_dict` returned when the checkpoint was written, if it was.
        """
        self.end()
        trainer = self.trainer
        resuming = state.global_step > 0
        config = self._run_config(state.max_steps, saved if resuming else None)
        engine = None
        if trainer.is_deepspeed_enabled:
            engine = trainer.accelerator.deepspeed_engine_wrapped.engine
            deepspeed.check_knobs(config, engine)
        shard = 0 if engine is None else deepspeed.shard_number(engine)
        aees = AEES.from_config(
            trainer.optimizer, config, shard=shard, buffers=trainer.model.buffers()
        )
        if resuming and saved is not None:
            aees.load_state_dict(saved)
            if aees.divergence is not None and self.resumed_folder is not None:
                aees.divergence.load(self.resumed_folder / self._snapshot_file)
        if resuming and self.resumed_folder is not None and not has_optimizer(self.resumed_folder):
            logger.warning(
                "%s holds weights only, as `save_only_model` saves them. Optimizer, schedule and "
                "random state start afresh, so the run does not go on as it would have.",
                self.resumed_folder,
            )
        if resuming and saved is None:
            logger.warning(
                "The checkpoint at step %d has no AEES state; it was saved without pulseopt_hf. "
                "Its weights are resumed and the bandits start afresh.",
                state.global_step,
            )
        self._aees = trainer.aees = aees
        if not resuming:
            self._calibrator = Calibrator.of(trainer, aees, config, state.max_steps)
        elif isinstance(saved, dict) and "calibration" in saved:
            self._calibrator = Calibrator(trainer, aees, config, state.max_steps)
            self._calibrator.load_state_dict(saved, self.resumed_folder)
        self._recorder = RunRecorder.of(trainer, aees, state)
        self._loss = None
        self._engine_stepped = False
        self._guard = NonFiniteGuard(
            trainer.accelerator, self._patches, trainer.model_wrapped.parameters()
        )
        self._plain_step = trainer.optimizer.step
        at_step: Callable[[], None] = lambda: self.seam()  # noqa: E731
        if engine is not None:
            self._plain_step = DeepSpeedSteps(engine, self._patches, at_step).run
            at_step = self._settle_engine_step
        self._patches.wrap(trainer.optimizer, "step", lambda step: lambda closure=None: at_step())

    def begin_step(self, global_step: int) -> None:
        """Note that Trainer starts on the first micro-batch of an optimizer step."""
        if self._aees is None:
            return
        self._loss = None
        self._aees.abandon()  # a step that Trainer broke off, as it does at the end of training
        if self._calibrator is not None:
            self._calibrator.begin_step(global_step)
        self._aees.step_start(global_step)

    def observe(self, loss: Tensor) -> None:
        """Add a micro-batch's loss, as `training_step` returned it, to the step's loss.

        In float32 and in order, so that the sum is bit for bit what Trainer logs with
        `logging_steps=1`. Reads nothing from the device.
        """
        if self._aees is not None:
            loss = loss.detach().to(torch.float32)
            self._loss = loss if self._loss is None else self._loss + loss

    def optimizer_step(self) -> None:
        """Do what stands where Trainer steps the optimizer: guard, then the step under the arm.

        A DeepSpeed engine steps earlier, inside `training_step`, and this is called there; what
        became of the step counts where Trainer would take it, when its loss is known.

        Raises:
            RuntimeError: `training_step` was not seen, or too many steps were skipped in a row.
            ValueError: the step is not finite and `nonfinite` is `raise`.
        """
        aees, guard, plain_step = self._aees, self._guard, self._plain_step
        if aees is None or guard is None or plain_step is None:
            raise RuntimeError(
                "`optimizer_step` is called by Trainer's loop, during training only."
            )
        if self.trainer.is_deepspeed_enabled:
            self._engine_stepped = aees.apply(plain_step)
            return
        loss = self._take_loss()
        # A gradient scaler is a guard itself, and has to be stepped to lower its scale.
        happened = self.trainer.optimizer.scaler is not None or guard.is_finite()
        if happened:
            happened = aees.apply(plain_step)
        mark_step_skipped(self.trainer.optimizer, not happened)
        self._settle(aees, loss, happened)

    @property
    def _snapshot_file(self) -> str:
        return f"pulse_episode_{self.trainer.args.process_index}.safetensors"

    def _settle_engine_step(self) -> None:
        assert self._aees is not None
        happened, self._engine_stepped = self._engine_stepped, False
        mark_engine_step_skipped(self.trainer.optimizer, not happened)
        self._settle(self._aees, self._take_loss(), happened)

    def _settle(self, aees: AEES, loss: Tensor, happened: bool) -> None:
        """Count the step or skip it."""
        if happened:
            record = aees.record(loss)
            if record is not None:
                logger.info(
                    "Episode %d: %s, loss %.4g to %.4g, reward %+.4f",
                    len(aees.controller.records),
                    record.name,
                    record.ema_start,
                    record.ema_end,
                    record.reward,
                )
                if record.outcome is not None:
                    logger.warning(
                        "Episode %d, %s, diverged at step %d and was %s.",
                        len(aees.controller.records),
                        record.name,
                        record.end_step,
                        record.outcome,
                    )
        elif aees.config.nonfinite == "raise" and not self._is_overflow(aees, loss):
            raise ValueError(
                f"The loss or a gradient is not finite at global step "
                f"{self.trainer.state.global_step}; the step's loss is {loss.item()}."
            )
        else:
            aees.skip()

    def _take_loss(self) -> Tensor:
        loss, self._loss = self._loss, None
        if loss is None:
            name = type(self.trainer).__name__
            raise RuntimeError(
                f"An optimizer step came without a loss: this {name} does not go through the "
                f"`training_step` that pulseopt_hf listens to. Use `with_pulseopt({name})`, and "
                "have `training_step` return the loss."
            )
        return loss

    def agree(self, model: object = None, trial: object = None) -> None:
        """Make ready for a checkpoint; every rank takes part.

        Args:
            model: as `SAVE_CHECKPOINT` is given it.
            trial: the same, of a hyperparameter search.
        """
        if self._aees is not None:
            self._aees.agree()
        if self._calibrator is not None:
            self._calibrator.save(checkpoint_folder(self.trainer, trial))
        if self._aees is not None and self._aees.divergence is not None:
            if self._aees.controller.episode is not None:
                folder = checkpoint_folder(self.trainer, trial)
                folder.mkdir(parents=True, exist_ok=True)
                self._aees.divergence.save(folder / self._snapshot_file)

    def end(self, error: BaseException | None = None) -> None:
        """Finish training, or what an exception left of it. `trainer.aees` keeps the record.

        Args:
            error: the exception that ends it.
        """
        if self._aees is not None and self._recorder is not None:
            self._recorder.end(self.trainer.state.global_step, error)
        self._patches.undo()
        if self._aees is not None:
            self._aees.remove()
        self._aees = self._guard = self._plain_step = self._loss = self._calibrator = None

    def finalize(self) -> None:
        """Close the last episode, which may be a partial one."""
        if self._aees is not None:
            self._aees.finalize()
        if self._recorder is not None:
            self._recorder.end(self.trainer.state.global_step)

    def note_log(self, entry: dict[str, Any]) -> None:
        """Write an entry of the log history into the run record; one after training too."""
        if self._recorder is not None:
            self._recorder.log(entry)

    def state_dict(self) -> StateDict | None:
        """Return what a checkpoint has to hold, or `None` outside of training."""
        if self._aees is None:
            return None
        state = self._aees.state_dict()
        if self._calibrator is not None:
            state["calibration"] = self._calibrator.state_dict()
        return state

    def log_values(self) -> dict[str, float]:
        """Return the `pulse/*` values of the latest step, for Trainer's log.

        A neutral run, whose every step is plain, has none unless a step was skipped.
        """
        aees = self._aees
        quiet = self._calibrator is None and aees is not None and not aees.skipped_steps
        if aees is None or (aees.controller.is_neutral and quiet):
            return {}
        records, episode = aees.controller.records, aees.controller.episode
        values: dict[str, float] = {"pulse/skipped_steps": aees.skipped_steps}
        if self._calibrator is not None:
            values["pulse/lr_scale"] = aees.lr_scale
        if episode is not None:
            values["pulse/episode"] = len(records) + 1
            values["pulse/lr_multiplier"] = episode.arm.lr_multiplier
            values["pulse/noise_std"] = episode.arm.noise_std
        elif records:
            values["pulse/episode"] = len(records)
            values["pulse/lr_multiplier"] = records[-1].lr_value
            values["pulse/noise_std"] = records[-1].noise_value
        if aees.learning_rate is not None:
            values["pulse/learning_rate"] = aees.learning_rate
        if records:
            values["pulse/reward"] = records[-1].reward
        return values

    def _is_overflow(self, aees: AEES, loss: Tensor) -> bool:
        """Whether a skip is a gradient scaler's ordinary overflow: all ranks' losses are finite."""
        scaled = self.trainer.optimizer.scaler is not None
        if self.trainer.is_deepspeed_enabled:
            scaled = self.trainer.accelerator.mixed_precision == "fp16"
        # One rank alone must not raise: the others would wait for it.
        return scaled and not aees.any_rank(not bool(torch.isfinite(loss).item()))

    def _run_config(self, max_steps: int, saved: object | None) -> PulseOptConfig:
        args = self.trainer.args
        config = self._config
        if config is None:
            # Read at every start: a hyperparameter search sets knobs between trials.
            config = PulseOptConfig()
            if isinstance(args, PulseOptKnobs):
                config = PulseOptConfig.of_knobs(args)
        unset = config.episode_length is None
        config = config.for_run(max_steps, args.seed)
        if unset and saved is not None:
            # A resumed run may be made longer; its episodes keep the length they had.
            controller = field(saved, "controller", lambda value, name: value)
            settings = field(controller, "settings", lambda value, name: value)
            config.episode_length = field(settings, "episode_length", integer)
        assert config.episode_length is not None
        episodes = max_steps // config.episode_length
        if 1 < config.arms and episodes < config.arms:
            warnings.warn(
                f"{max_steps} steps make {episodes} episodes of {config.episode_length} steps for "
                f"{config.arms} arms, so not every arm is tried. Set `episode_length` to at most "
                f"{max(1, max_steps // config.arms)}, or give fewer candidates.",
                stacklevel=2,
            )
        return config

    def _check_engine(self) -> None:
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            deepspeed.check_settings(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
        optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
        if "lomo" in optim or "layerwise" in optim:
            raise ValueError(
                f"`optim={optim}` updates parameters during the backward pass, so there is no "
                "step for an arm to apply to. Choose an optimizer that steps, such as "
                "`adamw_torch`."
            )
