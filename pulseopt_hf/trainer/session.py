"""One Trainer's connection to the method: what the mixin and the callback have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pulseopt_hf.aees.json_checks import StateDict
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import AEES
from pulseopt_hf.optim.movement import loss_of
from pulseopt_hf.trainer import deepspeed
from pulseopt_hf.trainer.checkpoints import has_optimizer
from pulseopt_hf.trainer.deepspeed import DeepSpeedSteps
from pulseopt_hf.trainer.eligibility import is_to_calibrate, length_of_run
from pulseopt_hf.trainer.log_values import log_episode, log_values
from pulseopt_hf.trainer.nonfinite import is_finite, show_losses_in_gradients
from pulseopt_hf.trainer.patches import wrap
from pulseopt_hf.trainer.record_writer import RunRecorder
from pulseopt_hf.trainer.settings import (
    check_events,
    check_given_once,
    check_optimizer,
    run_config,
)
from pulseopt_hf.trainer.trackers import show_trials
from pulseopt_hf.trainer.upstream import checkpoint_folder, mark_step_skipped

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
        config: the knobs; for `None` see `PulseOptCallback`.
        unattached: whether the Trainer is a `TrainerOfEvents`, so that there can be no arms.
        latest: the AEES of the run before, if there was one.
        asked: the training arguments for which the LR is only asked: the run ends when it is found,
            and leaves it as it is.

    Raises:
        ValueError: the knobs were given twice, or the Trainer's optimizer cannot be adapted.
    """

    def __init__(
        self,
        trainer: Any,
        config: PulseOptConfig | None,
        *,
        unattached: bool = False,
        latest: AEES | None = None,
        asked: TrainingArguments | None = None,
    ) -> None:
        check_optimizer(trainer)
        self.only_ask = asked is not None
        if config is not None and not self.only_ask:
            check_given_once(trainer.args)
        # Upstream annotates `optimizer` and friends as what they are before training prepares them.
        self.trainer: Any = trainer if unattached else None
        self.is_unattached = unattached
        self.latest = latest  # of the current or latest run
        self._asked = asked
        self._config = config
        self._patches = ExitStack()
        self._aees: AEES | None = None
        self._norm: float | Tensor | None = None
        self._plain_step: Callable[[], object] | None = None
        self._loss: Tensor | None = None
        self._recorder: RunRecorder | None = None
        self._trials_shown = False
        # The checkpoint that `train` was asked to resume from.
        self.resumed_folder: Path | None = None

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
        config = run_config(trainer, self._config, state.max_steps, saved if resuming else None)
        if self.is_unattached:
            check_events(trainer, config)
            folder = checkpoint_folder(trainer)
            self.resumed_folder = folder if resuming and folder.is_dir() else None
        engine, options = None, dict[str, Any]()
        if trainer.is_deepspeed_enabled:
            engine = trainer.accelerator.deepspeed_engine_wrapped.engine
            deepspeed.check_knobs(config, engine)
            options["shard"] = deepspeed.shard_number(engine)
            options["scales_loss"] = trainer.accelerator.mixed_precision == "fp16"
        before = None if self.latest is None else self.latest.calibrator
        if before is not None and not resuming:
            # Trainer keeps its optimizer for another training, and where memory ran out.
            before.undo(trainer.optimizer, trainer.lr_scheduler)
        aees = AEES.from_config(
            trainer.optimizer, config, buffers=trainer.model.buffers(), **options
        )
        was_calibrated = isinstance(saved, dict) and saved.get("calibration") is not None
        calibrates = was_calibrated
        if not resuming:
            calibrates = is_to_calibrate(trainer, config, state.max_steps, asked=self.only_ask)
        if calibrates:
            steps, passes = length_of_run(self._asked or trainer.args, batches)
            if not self.only_ask:
                steps = state.max_steps  # as Trainer counts; when asked, it is told a few
            model, scheduler = trainer.model_wrapped, trainer.lr_scheduler
            aees.calibrate(model, scheduler, steps, passes, only_ask=self.only_ask)
        if resuming:
            self._resume(aees, state.global_step, saved)
        self._aees = self.latest = trainer.aees = aees
        aees.listeners.append(log_episode)
        if not self.only_ask:
            self._recorder = RunRecorder.of(trainer, aees, state)
        self._trials_shown = False
        self._loss = None
        if self.is_unattached:
            handle = trainer.model.register_forward_hook(self._observe_output)
            self._patches.callback(handle.remove)
        else:
            show_losses_in_gradients(trainer.accelerator, self._patches)
        self._plain_step = trainer.optimizer.step
        at_step: Callable[[], None] = (
            self.optimizer_step if self.is_unattached else lambda: trainer.optimizer_step()
        )
        if engine is not None:
            self._plain_step = DeepSpeedSteps(engine, self._patches, at_step).run
            at_step = self._settle

        def stepping(step: Callable[..., Any]) -> Callable[..., Any]:
            def step_if_training(closure: Any = None) -> Any:
                # To save an optimizer without a state, torch steps it (`calibrator.run`).
                return step(closure) if aees.current_candidate is None else at_step()

            return step_if_training

        wrap(self._patches, trainer.optimizer, "step", stepping)

    def _resume(self, aees: AEES, step: int, saved: object | None) -> None:
        if saved is not None:
            aees.load_state_dict(saved)
            aees.load_files(self.resumed_folder, self.trainer.args.process_index)
        if self.resumed_folder is not None and not has_optimizer(self.resumed_folder):
            logger.warning(
                "%s holds weights only, as `save_only_model` saves them. Optimizer, schedule and "
                "random state start afresh, so the run does not go on as it would have.",
                self.resumed_folder,
            )
        if saved is None:
            logger.warning(
                "The checkpoint at step %d has no AEES state; it was saved without pulseopt_hf. "
                "Its weights and its learning rate are resumed; nothing is calibrated, and arms "
                "start afresh.",
                step,
            )

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
        self._norm = norm

    def optimizer_step(self) -> None:
        """Do what stands where Trainer steps the optimizer: guard, then the step under the arm.

        A DeepSpeed engine steps earlier, inside `training_step`, and this is called there; what
        became of the step counts where Trainer would take it, when its loss is known.

        Raises:
            RuntimeError: `training_step` was not seen, or too many steps were skipped in a row.
            ValueError: the step is not finite and `nonfinite` is `raise`.
        """
        aees, plain_step = self._aees, self._plain_step
        if aees is None or plain_step is None:
            raise RuntimeError(
                "`optimizer_step` is called by Trainer's loop, during training only."
            )
        if self._only_looks_on:
            plain_step()
            return
        if self.trainer.is_deepspeed_enabled:
            aees.apply(plain_step)
            return
        self._look_for_loss(aees)
        # A gradient scaler is a guard itself, so that the norm need not be read.
        scaled = self.trainer.optimizer.scaler is not None
        norm, self._norm = self._norm, None
        aees.apply(plain_step, scaled or is_finite(norm))
        if self.only_ask and not aees.is_calibrating:
            raise LearningRateFound
        self._settle()

    def _settle(self) -> None:
        """Let Trainer know what became of the step, and AEES its loss."""
        aees = self._aees
        assert aees is not None
        mark_step_skipped(self.trainer.optimizer, self.only_ask or not aees.step_happened)
        self._look_for_loss(aees)
        loss, self._loss = self._loss, None
        aees.settle(loss)

    def _look_for_loss(self, aees: AEES) -> None:
        """Give up a calibration that has no loss to watch.

        Raises:
            RuntimeError: there is none, and arms need one.
        """
        if self._loss is not None:
            return
        if not aees.controller.is_neutral:
            raise RuntimeError(
                "An optimizer step came without a loss: something stands in the place of the "
                f"`training_step` of this {type(self.trainer).__name__}. Override it in a "
                "subclass, and return the loss of `super().training_step(...)`."
            )
        aees.give_up_calibration(
            "the model returns no loss to watch over; "
            "`PulseOptCallback(config).attach(trainer)` knows the Trainer's"
            if self.is_unattached
            else "the loss of `training_step` was not seen; return that of "
            "`super().training_step(...)`"
        )

    @property
    def _only_looks_on(self) -> bool:
        """Whether Trainer steps on its own: it was calibrated by events alone."""
        return self.is_unattached and self._aees is not None and not self._aees.is_calibrating

    def agree(self) -> None:
        """Make ready for a checkpoint; every rank takes part."""
        if self._aees is not None:
            self._aees.agree()

    def save_files(self) -> None:
        """Write into a checkpoint what `state_dict` cannot hold; every rank takes part."""
        if self._aees is not None:
            folder = checkpoint_folder(self.trainer)
            self._aees.save_files(folder, self.trainer.args.process_index)

    def end(self, error: BaseException | None = None) -> None:
        """Finish training, or what an exception left of it. `trainer.aees` keeps the record.

        Args:
            error: the exception that ends it.
        """
        if self._aees is not None and self._recorder is not None:
            self._recorder.end(self.trainer.state.global_step, error)
        self._patches.close()
        if self._aees is not None:
            self._aees.remove()
        self._aees = self._norm = self._plain_step = self._loss = None

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
        """Return what a checkpoint has to hold, or `None` outside of training.

        Trainer asks on one rank alone. What ranks have not agreed on by then, since another
        callback asked for the checkpoint after this one, is left out.
        """
        if self._aees is None:
            return None
        if self.trainer.args.world_size == 1:
            self._aees.agree()
        return self._aees.agreed_state()

    def log_values(self) -> dict[str, float]:
        """Return what Trainer's log says of the latest step; nothing outside of training."""
        return {} if self._aees is None else log_values(self._aees)

    def _observe_output(self, model: object, args: object, output: object) -> None:
        """Take a model's own loss for the step's, where no event carries that."""
        loss = loss_of(output)
        if torch.is_grad_enabled() and loss is not None:
            self.observe(loss)
