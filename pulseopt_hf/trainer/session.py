"""One Trainer's connection to the method: what the mixin and the callback have in common."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pulseopt_hf.aees.calibration import not_calibrated
from pulseopt_hf.aees.state import StateDict, field, integer
from pulseopt_hf.config import PulseOptConfig, PulseOptKnobs
from pulseopt_hf.optim import AEES
from pulseopt_hf.optim.movement import loss_of
from pulseopt_hf.trainer import deepspeed
from pulseopt_hf.trainer.checkpoints import has_optimizer
from pulseopt_hf.trainer.deepspeed import DeepSpeedSteps
from pulseopt_hf.trainer.eligibility import passes_over_data, why_not_calibrate
from pulseopt_hf.trainer.guard import NonFiniteGuard
from pulseopt_hf.trainer.patches import MethodPatches
from pulseopt_hf.trainer.record import RunRecorder
from pulseopt_hf.trainer.trackers import show_trials
from pulseopt_hf.trainer.upstream import (
    checkpoint_folder,
    mark_engine_step_skipped,
    mark_step_skipped,
)

logger = logging.getLogger("pulseopt_hf")


class LearningRateFound(Exception):
    """Ends a training that was begun only to find the LR."""


_IN_TRAINING: list[PulseSession] = []


def session_in_training(args: TrainingArguments) -> PulseSession | None:
    """Return the session of the Trainer that is in `train()` with these arguments, if any."""
    found = [session for session in _IN_TRAINING if session.trainer.args is args]
    return found[-1] if found else None


class PulseSession:
    """Runs episodes in a Trainer's loop.

    Whoever owns the session reports to it: the micro-batch losses as `training_step` returns
    them (`observe`), the start of each step, of training and of a save, and calls `optimizer_step`
    where Trainer steps the optimizer.

    It holds on to its Trainer only while that trains: so both can be copied, pickled and deleted
    like any other.

    Args:
        trainer: the Trainer, fully constructed.
        config: the knobs; `None` takes them from `trainer.args` where those have them, and else
            the recommended ones.
        unattached: whether only a Trainer's events are known, so that there can be no arms.
        only_ask: whether to end when the LR is found, and leave it as it is.

    Raises:
        ValueError: the knobs were given twice, or the Trainer's optimizer cannot be adapted.
    """

    def __init__(
        self,
        trainer: Any,
        config: PulseOptConfig | None,
        *,
        unattached: bool = False,
        only_ask: bool = False,
    ) -> None:
        if config is not None and not only_ask and isinstance(trainer.args, PulseOptKnobs):
            if PulseOptConfig.of_knobs(trainer.args) != PulseOptConfig():
                raise ValueError(
                    "The knobs were given twice: in the training arguments and in a "
                    "PulseOptConfig. Give them once."
                )
        # Upstream annotates `optimizer` and friends as what they are before training prepares them.
        self.trainer: Any = None
        self.is_unattached = unattached
        self.only_ask = only_ask
        self.arguments: TrainingArguments | None = None  # of the run that is asked about
        self.latest: AEES | None = None  # of the current or latest run
        self._config = config
        self._patches = MethodPatches()
        self._aees: AEES | None = None
        self._guard: NonFiniteGuard | None = None
        self._plain_step: Callable[[], object] | None = None
        self._loss: Tensor | None = None
        self._engine_stepped = False
        self._recorder: RunRecorder | None = None
        self._trials_shown = False
        # The checkpoint that `train` was asked to resume from.
        self.resumed_folder: Path | None = None
        self._check_engine(trainer)

    @contextmanager
    def in_training(
        self,
        trainer: Trainer,
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Iterator[None]:
        """Hold on to a Trainer while its `train`, called with these arguments, runs."""
        folder: str | None = None
        if isinstance(resume_from_checkpoint, str | PathLike):
            folder = str(resume_from_checkpoint)
        elif resume_from_checkpoint:
            folder = get_last_checkpoint(trainer.args.output_dir)  # type: ignore[no-untyped-call]
        self.resumed_folder = None if folder is None else Path(folder)
        self.trainer = trainer
        _IN_TRAINING.append(self)
        try:
            yield
        except BaseException as error:
            self.end(error)
            raise
        finally:
            self.end()
            _IN_TRAINING.remove(self)
            self.trainer = None

    def begin(self, state: TrainerState, saved: object | None, batches: object) -> None:
        """Start training: a fresh controller, or the one of the checkpoint that is resumed.

        Args:
            state: Trainer's state, `global_step` > 0 when resuming.
            saved: what `state_dict` returned when the checkpoint was written, if it was.
            batches: what the training iterates over.

        Raises:
            RuntimeError: there are arms, and the Trainer's loss is not known.
            StateError: the saved state is damaged, or of other settings.
        """
        self.end()
        trainer = self.trainer
        resuming = state.global_step > 0
        config = self._run_config(state.max_steps, saved if resuming else None)
        if self.is_unattached:
            self._check_events(config)
            self.resumed_folder = checkpoint_folder(trainer, None) if resuming else None
        engine = None
        if trainer.is_deepspeed_enabled:
            engine = trainer.accelerator.deepspeed_engine_wrapped.engine
            deepspeed.check_knobs(config, engine)
        shard = 0 if engine is None else deepspeed.shard_number(engine)
        before = None if self.latest is None else self.latest.calibrator
        if before is not None and not resuming:
            # Trainer keeps its optimizer for another training, and where memory ran out.
            before.undo(trainer.optimizer, trainer.lr_scheduler)
        aees = AEES.from_config(
            trainer.optimizer, config, shard=shard, buffers=trainer.model.buffers()
        )
        was_calibrated = isinstance(saved, dict) and saved.get("calibration") is not None
        if was_calibrated if resuming else self._is_to_calibrate(config, state.max_steps):
            aees.calibrate(
                trainer.model_wrapped,
                trainer.lr_scheduler,
                state.max_steps,
                passes_over_data(self.arguments or trainer.args, batches),
                only_ask=self.only_ask,
            )
        if resuming and saved is not None:
            aees.load_state_dict(saved)
            if aees.calibrator is not None:
                aees.calibrator.load(self.resumed_folder, trainer.args.process_index)
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
                "Its weights and its learning rate are resumed; nothing is calibrated, and arms "
                "start afresh.",
                state.global_step,
            )
        self._aees = self.latest = trainer.aees = aees
        if not self.only_ask:
            self._recorder = RunRecorder.of(trainer, aees, state)
        self._trials_shown = False
        self._loss = None
        self._engine_stepped = False
        if self.is_unattached:
            handle = trainer.model.register_forward_hook(self._observe_output)
            self._patches.add(handle.remove)
        else:
            self._guard = NonFiniteGuard(trainer.accelerator, self._patches)
        self._plain_step = trainer.optimizer.step
        at_step: Callable[[], None] = (
            self.optimizer_step if self.is_unattached else lambda: trainer.optimizer_step()
        )
        if engine is not None:
            self._plain_step = DeepSpeedSteps(engine, self._patches, at_step).run
            at_step = self._settle_engine_step

        def stepping(step: Callable[..., Any]) -> Callable[..., Any]:
            def step_if_training(closure: Any = None) -> Any:
                # To save an optimizer without a state, torch steps it (`calibrator.run`).
                return step(closure) if aees.current_candidate is None else at_step()

            return step_if_training

        self._patches.wrap(trainer.optimizer, "step", stepping)

    def begin_step(self, global_step: int) -> None:
        """Note that Trainer starts on the first micro-batch of an optimizer step."""
        if self._aees is None or self._only_looks_on:
            return
        self._loss = None
        self._aees.abandon()  # a step that Trainer broke off, as it does at the end of training
        self._aees.step_start(global_step)

    def observe(self, loss: Tensor) -> None:
        """Add a micro-batch's loss, as `training_step` returned it, to the step's loss.

        In float32 and in order, so that the sum is bit for bit what Trainer logs with
        `logging_steps=1`. Reads nothing from the device.
        """
        if self._aees is not None:
            loss = loss.detach().to(torch.float32)
            self._loss = loss if self._loss is None else self._loss + loss

    def note_norm(self, norm: float | Tensor) -> None:
        """Note the gradient norm that Trainer has computed for the step that comes."""
        if self._guard is not None:
            self._guard.norm = norm

    def optimizer_step(self) -> None:
        """Do what stands where Trainer steps the optimizer: guard, then the step under the arm.

        A DeepSpeed engine steps earlier, inside `training_step`, and this is called there; what
        became of the step counts where Trainer would take it, when its loss is known.

        Raises:
            RuntimeError: `training_step` was not seen, or too many steps were skipped in a row.
            ValueError: the step is not finite and `nonfinite` is `raise`.
        """
        aees, guard, plain_step = self._aees, self._guard, self._plain_step
        if aees is None or plain_step is None:
            raise RuntimeError(
                "`optimizer_step` is called by Trainer's loop, during training only."
            )
        if self._only_looks_on:
            plain_step()
            return
        if self.trainer.is_deepspeed_enabled:
            self._engine_stepped = aees.apply(plain_step)
            self._stop_asking(aees)
            return
        loss, self._loss = self._loss, None
        if loss is None:
            self._do_without_loss(aees)
        # A gradient scaler is a guard itself, and has to be stepped to lower its scale.
        scaled = self.trainer.optimizer.scaler is not None
        happened = scaled or guard is None or guard.is_finite()
        if happened:
            happened = aees.apply(plain_step)
        mark_step_skipped(self.trainer.optimizer, self.only_ask or not happened)
        self._stop_asking(aees)
        self._settle(aees, loss, happened)

    def _do_without_loss(self, aees: AEES) -> None:
        """Go on without a calibration, which has to watch the loss, where no arm needs one.

        Raises:
            RuntimeError: there are arms.
        """
        if not aees.controller.is_neutral:
            raise RuntimeError(
                "An optimizer step came without a loss: something stands in the place of the "
                f"`training_step` of this {type(self.trainer).__name__}. Override it in a "
                "subclass, and return the loss of `super().training_step(...)`."
            )
        if aees.calibrator is not None and aees.is_calibrating:
            aees.calibrator.give_up(
                "the model returns no loss to watch over; "
                "`PulseOptCallback(config).attach(trainer)` knows the Trainer's"
                if self.is_unattached
                else "the loss of `training_step` was not seen; return that of "
                "`super().training_step(...)`",
                self.trainer.state.global_step,
            )

    def _stop_asking(self, aees: AEES) -> None:
        if self.only_ask and not aees.is_calibrating:
            raise LearningRateFound

    @property
    def _only_looks_on(self) -> bool:
        """Whether Trainer steps on its own: it was calibrated by events alone."""
        return self.is_unattached and self._aees is not None and not self._aees.is_calibrating

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done to the LR, so that a run is the stock Trainer's."""
        aees = self._aees
        return aees is None or (aees.controller.is_neutral and aees.calibrator is None)

    @property
    def _snapshot_file(self) -> str:
        return f"pulse_episode_{self.trainer.args.process_index}.safetensors"

    def _settle_engine_step(self) -> None:
        assert self._aees is not None
        happened, self._engine_stepped = self._engine_stepped, False
        mark_engine_step_skipped(self.trainer.optimizer, not happened)
        loss, self._loss = self._loss, None
        if loss is None:
            self._do_without_loss(self._aees)
        self._settle(self._aees, loss, happened)

    def _settle(self, aees: AEES, loss: Tensor | None, happened: bool) -> None:
        """Count the step or skip it; one without a loss is not counted."""
        if happened:
            if loss is None:
                aees.abandon()
                return
            record = aees.record(loss)
            if record is not None:
                logger.info(
                    "Episode %d: %s, loss %.4g to %.4g, reward %+.4f",
                    aees.controller.closed,
                    record.name,
                    record.ema_start,
                    record.ema_end,
                    record.reward,
                )
                if record.outcome is not None:
                    logger.warning(
                        "Episode %d, %s, diverged at step %d and was %s.",
                        aees.controller.closed,
                        record.name,
                        record.end_step,
                        record.outcome,
                    )
        elif aees.config.nonfinite == "raise" and not self._is_overflow(aees, loss):
            raise ValueError(
                f"The loss or a gradient is not finite at global step "
                f"{self.trainer.state.global_step}; the step's loss is "
                f"{'unknown' if loss is None else loss.item()}."
            )
        else:
            aees.skip()

    def agree(self, model: object = None, trial: object = None) -> None:
        """Make ready for a checkpoint; every rank takes part.

        Args:
            model: as `SAVE_CHECKPOINT` is given it.
            trial: the same, of a hyperparameter search.
        """
        if self._aees is not None:
            self._aees.agree()
            self.save_files(trial)

    def save_files(self, trial: object = None) -> None:
        """Write into a checkpoint what `state_dict` cannot hold; every rank takes part."""
        aees = self._aees
        if aees is None:
            return
        folder = checkpoint_folder(self.trainer, trial)
        if aees.is_calibrating and aees.calibrator is not None:
            aees.calibrator.save(folder, self.trainer.args.process_index)
        if aees.divergence is not None and aees.controller.episode is not None:
            aees.divergence.save(folder / self._snapshot_file)

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
        self._aees = self._guard = self._plain_step = self._loss = None

    def finalize(self) -> None:
        """Close the last episode, which may be a partial one."""
        if self._aees is not None:
            self._aees.finalize()
        if self._recorder is not None:
            self._recorder.end(self.trainer.state.global_step)

    def note_log(self, entry: dict[str, Any]) -> None:
        """Write an entry of the log history into the run record; one after training too.

        Trackers are open then: the first time after the calibration they are shown its trials.
        """
        if self._recorder is not None:
            self._recorder.log(entry)
        calibrator = None if self._aees is None else self._aees.calibrator
        if calibrator is None or calibrator.outcome is None or self._trials_shown:
            return
        self._trials_shown = True
        if not self.is_unattached and self.trainer.is_world_process_zero():
            show_trials(self.trainer, calibrator.search.trials)

    def state_dict(self) -> StateDict | None:
        """Return what a checkpoint has to hold, or `None` outside of training."""
        if self._aees is None:
            return None
        return self._aees.state_dict()

    def log_values(self) -> dict[str, float]:
        """Return the `pulse/*` values of the latest step, for Trainer's log.

        With one arm they are what can vary: the effective LR, unless every step is plain, and the
        skipped steps, once there are some.
        """
        aees = self._aees
        if aees is None:
            return {}
        values: dict[str, float] = {}
        if aees.config.arms > 1 or aees.skipped_steps:
            values["pulse/skipped_steps"] = aees.skipped_steps
        if aees.learning_rate is not None and not self.is_plain:
            values["pulse/learning_rate"] = aees.learning_rate
            if aees.ramp < 1.0:
                values["learning_rate"] = aees.learning_rate
        if aees.config.arms == 1:
            return values
        records, episode = aees.controller.records, aees.controller.episode
        if episode is not None:
            values["pulse/episode"] = aees.controller.closed + 1
            values["pulse/lr_multiplier"] = episode.arm.lr_multiplier
            values["pulse/noise_std"] = episode.arm.noise_std
        elif records:
            values["pulse/episode"] = aees.controller.closed
            values["pulse/lr_multiplier"] = records[-1].lr_value
            values["pulse/noise_std"] = records[-1].noise_value
        if records:
            values["pulse/reward"] = records[-1].reward
        return values

    def _is_overflow(self, aees: AEES, loss: Tensor | None) -> bool:
        """Whether a skip is a gradient scaler's ordinary overflow: all ranks' losses are finite."""
        scaled = self.trainer.optimizer.scaler is not None
        if self.trainer.is_deepspeed_enabled:
            scaled = self.trainer.accelerator.mixed_precision == "fp16"
        # One rank alone must not raise: the others would wait for it.
        bad = loss is not None and not bool(torch.isfinite(loss).item())
        return scaled and not aees.any_rank(bad)

    def _run_config(self, max_steps: int, saved: object | None) -> PulseOptConfig:
        args = self.trainer.args
        config = self._config
        if config is None:
            # Read at every start: a hyperparameter search sets knobs between trials.
            config = PulseOptConfig()
            if isinstance(args, PulseOptKnobs):
                config = PulseOptConfig.of_knobs(args)
        if (idle := config.idle_knobs()) and self.trainer.is_world_process_zero():
            logger.warning(
                "%s has no effect with one arm. Give several `lr_candidates` or "
                "`noise_candidates`.",
                " and ".join(f"`{name}`" for name in idle),
            )
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

    def _is_to_calibrate(self, config: PulseOptConfig, max_steps: int) -> bool:
        """Whether the LR of a run that begins is to be calibrated; says why not, once."""
        if config.calibration == "off":
            return False
        reason = why_not_calibrate(self.trainer, config, max_steps)
        if self.only_ask:
            if reason is not None:
                raise ValueError(not_calibrated(reason))
        elif reason is not None and self.trainer.is_world_process_zero():
            logger.warning(not_calibrated(reason))
        return reason is None

    def _check_events(self, config: PulseOptConfig) -> None:
        arms = [config.lr_candidates, config.noise_candidates]
        if arms != [[1.0], [0.0]] or self.trainer.is_deepspeed_enabled:
            raise RuntimeError(
                "PulseOptCallback is not attached, and no event hands it the loss, which arms "
                "need, or DeepSpeed's engine. Write `PulseOptCallback(config).attach(trainer)`, or "
                "use PulseOptTrainer."
            )

    def _observe_output(self, model: object, args: object, output: object) -> None:
        """Take a model's own loss for the step's, where no event carries that."""
        loss = loss_of(output)
        if torch.is_grad_enabled() and loss is not None:
            self.observe(loss)

    def _check_engine(self, trainer: Any) -> None:
        if trainer.is_deepspeed_enabled:
            deepspeed.check_settings(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
        optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
        if "lomo" in optim or "layerwise" in optim:
            raise ValueError(
                f"`optim={optim}` updates parameters during the backward pass, so there is no "
                "step for an arm to apply to. Choose an optimizer that steps, such as "
                "`adamw_torch`."
            )
