"""AEES as a subclass of any Trainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import AEES
from pulseopt_hf.optim.suggestion import Suggestion
from pulseopt_hf.trainer.callback import PulseOptCallback
from pulseopt_hf.trainer.card import add_section
from pulseopt_hf.trainer.session import PulseSession


class PulseOptMixin:
    """Makes a Trainer calibrate its LR and train in episodes; put it before the Trainer class.

        class MyPulseOptTrainer(PulseOptMixin, MyTrainer): ...

    Attributes:
        aees: the AEES of the current or latest run, or `None` before the first run. Its
            `get_logs()` returns the episodes.
    """

    aees: AEES | None = None

    def __init__(self, *args: Any, pulse: PulseOptConfig | None = None, **kwargs: Any) -> None:
        """Create the Trainer.

        Args:
            *args: arguments of the Trainer.
            pulse: the knobs. With `None` they come from the training arguments if these are
                `PulseOptTrainingArguments`; otherwise they are the recommended ones.
            **kwargs: arguments of the Trainer.

        Raises:
            TypeError: `pulse` is not a `PulseOptConfig`.
            ValueError: the knobs were given twice, or the optimizer or engine is not supported.
        """
        if pulse is not None and not isinstance(pulse, PulseOptConfig):
            raise TypeError(f"`pulse` must be a PulseOptConfig, got {type(pulse).__name__}.")
        super().__init__(*args, **kwargs)
        connect(self, PulseOptCallback(pulse))

    def optimizer_step(self) -> None:
        """Step the optimizer with the arm, or skip the step if it is not finite.

        Trainer has no such method. Override it to do something before or after a step, and call
        `super().optimizer_step()` in between.
        """
        self._pulse.optimizer_step()

    def find_learning_rate(self) -> Suggestion:
        """Find the learning rate without training; see `pulseopt_hf.find_learning_rate`."""
        from pulseopt_hf.trainer.find import find_learning_rate

        trainer: Any = self
        return find_learning_rate(trainer)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`."""
        trainer: Any = self
        with self._pulse.in_training(trainer, *args, **kwargs):
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Get the batches of an optimizer step, or none after the last step of the run.

        Resumed from the checkpoint of its last step, Trainer would take one more step, unless an
        epoch ends there.
        """
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-batch forward and backward; see `Trainer.training_step`."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._pulse.observe(loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the `pulse/*` values beside the loss; see `Trainer.log`."""
        if "loss" in logs:
            logs = {**logs, **self._pulse.log_values()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card, with a section on the LR; see `Trainer.create_model_card`."""
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        add_section(self)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        # See `upstream.GRAD_NORM`.
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        self._pulse.note_norm(norm)
        return norm

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        # See `upstream.SAVE_CHECKPOINT`.
        self._pulse.agree()
        self._pulse.save_files()
        return super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    _pulse: PulseSession
    _made_of: type[Trainer] | None = None  # in a class that `with_pulseopt` made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle an instance of a class that `with_pulseopt` made, which is in no module."""
        base = vars(type(self)).get("_made_of")
        if base is None:
            return super().__reduce_ex__(protocol)
        return _blank, (base,), self.__dict__


class PulseOptTrainer(PulseOptMixin, Trainer):
    """A Trainer that finds its LR in the first steps and can play arms; see `PulseOptMixin`."""


class PulseOptSeq2SeqTrainer(PulseOptMixin, Seq2SeqTrainer):
    """`PulseOptTrainer` for `Seq2SeqTrainer`; see `PulseOptMixin`."""


def with_pulseopt(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return a subclass of any Trainer class that calibrates its LR and can play arms.

    The same class gives the same subclass at every call:

        trainer = with_pulseopt(SFTTrainer)(model, pulse=PulseOptConfig(), ...)

    Raises:
        TypeError: `trainer_class` is not a subclass of Trainer, or has AEES already.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"`trainer_class` must be a subclass of Trainer, got {trainer_class!r}.")
    if issubclass(trainer_class, PulseOptMixin):
        raise TypeError(f"{trainer_class.__name__} has AEES already.")
    if trainer_class not in _MADE:
        content = {
            "__doc__": f"{trainer_class.__name__} with AEES.",
            "__module__": trainer_class.__module__,
            "_made_of": trainer_class,
        }
        bases = (PulseOptMixin, trainer_class)
        _MADE[trainer_class] = type(f"PulseOpt{trainer_class.__name__}", bases, content)
    return _MADE[trainer_class]


_MADE: dict[type, type[Trainer]] = {}


def connect(
    trainer: Any, callback: PulseOptCallback, asked: TrainingArguments | None = None
) -> None:
    """Give a Trainer its session, and the session the Trainer's events.

    Args:
        trainer: the Trainer.
        callback: hands on the events, and has the knobs.
        asked: see `PulseSession`.
    """
    trainer._pulse = callback.session = PulseSession(trainer, callback.config, asked=asked)
    if callback not in trainer.callback_handler.callbacks:
        trainer.add_callback(callback)


def _blank(trainer_class: type[Trainer]) -> Trainer:
    made: Any = with_pulseopt(trainer_class)
    blank: Trainer = made.__new__(made)
    return blank
