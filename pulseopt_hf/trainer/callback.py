"""AEES for a Trainer as it is: a callback, attached to the instance where there are arms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import AEES
from pulseopt_hf.optim.unwrap import is_stepped_by_deepspeed
from pulseopt_hf.trainer.session import PulseSession, session_in_training


class PulseOptCallback(TrainerCallback, ExportableState):
    """Makes any Trainer instance do what `PulseOptTrainer` does.

    To calibrate the learning rate, pass `callbacks=[PulseOptCallback()]`. For arms, attach it:

        trainer = Trainer(model, args, train_dataset=data)
        PulseOptCallback(PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0])).attach(trainer)
        trainer.train()
        trainer.aees.get_logs()

    Arms need the loss of each step, which no event of Trainer carries. So `attach` changes the
    class of the instance to the one that `with_pulseopt` makes from it.

    Args:
        config: the knobs. With `None` they come from the training arguments if these are
            `PulseOptTrainingArguments`; otherwise they are the recommended ones.
    """

    def __init__(self, config: PulseOptConfig | None = None) -> None:
        self.config = config
        self.session: PulseSession | None = None
        self._save_after_epoch = False

    def attach(self, trainer: Trainer) -> PulseOptCallback:
        """Connect to a Trainer before its `train()`, and add this callback if it is missing.

        Raises:
            TypeError: `trainer` is not a Trainer.
            RuntimeError: it has AEES already, or it is training.
            ValueError: its optimizer or engine is not supported.
        """
        from pulseopt_hf.trainer.mixin import PulseOptMixin, connect, with_pulseopt

        if not isinstance(trainer, Trainer):
            raise TypeError(f"`trainer` must be a Trainer, got {type(trainer).__name__}.")
        if isinstance(trainer, PulseOptMixin):
            raise RuntimeError(f"This {type(trainer).__name__} has AEES already; attach it once.")
        if trainer.is_in_train:
            raise RuntimeError("Attach PulseOptCallback before `train()`, not during training.")
        connect(trainer, self)
        trainer.__class__ = with_pulseopt(type(trainer))
        return self

    @property
    def aees(self) -> AEES | None:
        """The AEES of the current or latest run, or `None` before the first run."""
        return None if self.session is None else self.session.latest

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the controller, or load it from the checkpoint that is resumed."""
        if self.session is None:
            # With `restore_callback_states_from_checkpoint=True` Trainer replaces each stateful
            # callback by a new instance of its class.
            self.session = session_in_training(args)
        name = type(self).__name__
        callbacks = cast("dict[str, Any]", state.stateful_callbacks)  # upstream says list
        entry = callbacks.get(name)
        attributes = entry.get("attributes") if isinstance(entry, dict) else None
        saved = attributes.get("saved_state") if isinstance(attributes, dict) else None
        # Trainer expects the key when it saves, and a checkpoint of a plain Trainer lacks it.
        callbacks.setdefault(name, {})
        if self.session is None or self.session.is_unattached:
            parts = {key: kwargs[key] for key in ("model", "optimizer", "lr_scheduler")}
            trainer = TrainerOfEvents(args, state, **parts)
            self.session = PulseSession(trainer, self.config, unattached=True, latest=self.aees)
        self.session.begin(state, saved, kwargs["train_dataloader"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an optimizer step."""
        if self.session is not None:
            self.session.begin_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make ready for a checkpoint, or put it off until the epoch's evaluation is done.

        Resumed from one before it, Trainer would leave the evaluation out, and with it the random
        numbers that its data loader draws: the run would not end as the uninterrupted one. Where
        nothing is done to the LR, the order of events stays Trainer's own.
        """
        if self.session is None or self.aees is None or self.aees.is_plain:
            return
        is_unattached = self.session.is_unattached
        if is_unattached and (control.should_save or control.should_evaluate):  # may ask to save
            self.session.agree()
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        if control.should_save and ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_save = False
            self._save_after_epoch = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save what `on_step_end` put off; Trainer evaluates first."""
        if self.session is not None and self.session.is_unattached:
            self.session.agree()
        if self._save_after_epoch:
            self._save_after_epoch = False
            control.should_save = True

    def on_save(self, *event: Any, **kwargs: Any) -> None:
        """Complete a checkpoint, where only events say that there is one."""
        if self.session is not None and self.session.is_unattached:
            self.session.save_files()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write into the run record what Trainer has just added to its log history."""
        if self.session is not None and state.log_history:
            self.session.note_log(state.log_history[-1])

    def on_train_end(self, *event: Any, **kwargs: Any) -> None:
        """Close the last episode."""
        if self.session is not None:
            self.session.finalize()
            if self.session.is_unattached:
                self.session.end()

    def state(self) -> dict[str, Any]:
        """Return what Trainer writes into `trainer_state.json`, and with it into a checkpoint."""
        saved = None if self.session is None else self.session.state_dict()
        return {"args": {}, "attributes": {"saved_state": saved}}


@dataclass
class TrainerOfEvents:
    """What of a Trainer its events hand out: enough to calibrate, not for arms."""

    args: TrainingArguments
    state: TrainerState
    model: nn.Module
    optimizer: Any
    lr_scheduler: Any
    accelerator: None = None
    aees: AEES | None = None
    _trial: None = None

    @property
    def model_wrapped(self) -> nn.Module:
        """The model, which is called by what wraps it."""
        return self.model

    @property
    def is_deepspeed_enabled(self) -> bool:
        """Whether the engine steps, which is not handed out."""
        return is_stepped_by_deepspeed(self.optimizer)

    def is_world_process_zero(self) -> bool:
        """Whether this process writes files."""
        return bool(self.args.process_index == 0)

    def _get_output_dir(self, trial: object) -> str | None:
        return self.args.output_dir
