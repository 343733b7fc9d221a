"""AEES for a Trainer as it is: a callback that is attached to the instance."""

from __future__ import annotations

from typing import Any, cast

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from pulseopt_hf.aees.state import StateDict
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import AEES
from pulseopt_hf.trainer.card import add_section
from pulseopt_hf.trainer.patches import MethodPatches
from pulseopt_hf.trainer.session import SESSIONS, PulseSession
from pulseopt_hf.trainer.upstream import SAVE_CHECKPOINT


class PulseOptCallback(TrainerCallback, ExportableState):
    """Runs AEES in any Trainer instance, with the same steps as `PulseOptTrainer`.

        trainer = Trainer(model, args, train_dataset=data)
        PulseOptCallback(PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0])).attach(trainer)
        trainer.train()
        trainer.aees.get_logs()

    No event hands a callback the loss or the Trainer, so `attach` listens to the instance's
    `training_step` and stands before its `optimizer.step()`.

    Args:
        config: the knobs; `None` takes them from the training arguments where those are
            `PulseOptTrainingArguments`, and else the recommended ones.
    """

    def __init__(self, config: PulseOptConfig | None = None) -> None:
        """See the class."""
        self.config = config
        self.session: PulseSession | None = None
        self._save_after_epoch = False
        # Set by Trainer on the instance it rebuilds from a checkpoint, see `_find_session`.
        self.saved_state: StateDict | None = None

    def attach(self, trainer: Trainer) -> PulseOptCallback:
        """Connect to a Trainer, before its `train()`; adds the callback where it is not yet.

        Raises:
            TypeError: `trainer` is not a Trainer.
            RuntimeError: it has AEES already, or it is training.
            ValueError: its optimizer or engine cannot be adapted.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(f"`trainer` must be a Trainer, got {type(trainer).__name__}.")
        if any(session.trainer is trainer for session in SESSIONS):
            raise RuntimeError(f"This {type(trainer).__name__} has AEES already; attach it once.")
        if trainer.is_in_train:
            raise RuntimeError("Attach PulseOptCallback before `train()`, not during training.")
        session = PulseSession(trainer, self.config)
        self.connect(session)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        # These stay for the life of the Trainer; outside of training they add nothing.
        patches = MethodPatches()
        patches.wrap(trainer, "train", lambda train: _closing(session, train))
        patches.wrap(trainer, "training_step", lambda step: _observing(session, step))
        patches.wrap(trainer, "log", lambda log: _logging(session, log))
        patches.wrap(trainer, "create_model_card", lambda write: _adding(trainer, write))
        patches.wrap(trainer, SAVE_CHECKPOINT, lambda save: _agreeing(session, save))
        return self

    def connect(self, session: PulseSession) -> None:
        """Report events to `session`."""
        self.session = session

    @property
    def aees(self) -> AEES | None:
        """The Trainer's AEES of the current or latest run, or `None` before the first."""
        return None if self.session is None else getattr(self.session.trainer, "aees", None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the controller, or load it from the checkpoint that is resumed."""
        if self.session is None:
            self.session = self._find_session(args)
        name = type(self).__name__
        callbacks = cast("dict[str, Any]", state.stateful_callbacks)  # upstream says list
        entry = callbacks.get(name)
        attributes = entry.get("attributes") if isinstance(entry, dict) else None
        saved = attributes.get("saved_state") if isinstance(attributes, dict) else None
        # Trainer expects the key when it saves, and a checkpoint of a plain Trainer lacks it.
        callbacks.setdefault(name, {})
        self.session.begin(state, saved)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin an optimizer step."""
        if self.session is not None:
            self.session.begin_step(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put off a checkpoint of an epoch's last step until the epoch's evaluation is done.

        Resumed from one before it, Trainer would leave the evaluation out, and with it the random
        numbers that its data loader draws: the run would not end as the uninterrupted one.
        """
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        if control.should_save and ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_save = False
            self._save_after_epoch = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save what `on_step_end` put off; Trainer evaluates first."""
        if self._save_after_epoch:
            self._save_after_epoch = False
            control.should_save = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write into the run record what Trainer has just added to its log history."""
        if self.session is not None and state.log_history:
            self.session.note_log(state.log_history[-1])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the last episode."""
        if self.session is not None:
            self.session.finalize()

    def state(self) -> dict[str, Any]:
        """Return what Trainer writes into `trainer_state.json`, and with it into a checkpoint."""
        saved = None if self.session is None else self.session.state_dict()
        return {"args": {}, "attributes": {"saved_state": saved}}

    def _find_session(self, args: TrainingArguments) -> PulseSession:
        """Take over the session of the instance that Trainer replaced by this one.

        With `restore_callback_states_from_checkpoint=True` Trainer removes each stateful callback
        and adds a new instance of its class, which nobody attached.
        """
        for session in SESSIONS:
            if session.trainer.args is args and session.trainer.is_in_train:
                callbacks = session.trainer.callback_handler.callbacks
                if self in callbacks and not any(
                    isinstance(other, PulseOptCallback) and other.session is session
                    for other in callbacks
                ):
                    return session
        raise RuntimeError(
            "PulseOptCallback is not attached, and no event hands it the Trainer or the loss. "
            "Write `PulseOptCallback(config).attach(trainer)`, or use PulseOptTrainer."
        )


def _closing(session: PulseSession, train: Any) -> Any:
    def train_and_close(*args: Any, **kwargs: Any) -> Any:
        session.note_resume(*args, **kwargs)
        try:
            return train(*args, **kwargs)
        except BaseException as error:
            session.end(error)
            raise
        finally:
            session.end()

    return train_and_close


def _observing(session: PulseSession, training_step: Any) -> Any:
    def observed_training_step(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        session.observe(loss)
        return loss

    return observed_training_step


def _logging(session: PulseSession, log: Any) -> Any:
    def log_with_pulse(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **session.log_values()}
        log(logs, *args, **kwargs)

    return log_with_pulse


def _adding(trainer: Trainer, write_card: Any) -> Any:
    def write_card_with_section(*args: Any, **kwargs: Any) -> None:
        write_card(*args, **kwargs)
        add_section(trainer)

    return write_card_with_section


def _agreeing(session: PulseSession, save: Any) -> Any:
    def agree_and_save(*args: Any, **kwargs: Any) -> Any:
        session.agree(*args, **kwargs)
        return save(*args, **kwargs)

    return agree_and_save
