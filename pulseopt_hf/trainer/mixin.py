"""AEES as a subclass of any Trainer."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import Seq2SeqTrainer, Trainer

from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import AEES
from pulseopt_hf.trainer.callback import PulseOptCallback
from pulseopt_hf.trainer.card import add_section
from pulseopt_hf.trainer.session import PulseSession


class PulseOptMixin:
    """Stands before a Trainer class in the bases and runs its training in episodes.

    Attributes:
        aees: the AEES of the current or latest run, or `None` before the first; its `get_logs()`
            is the record of episodes.
    """

    aees: AEES | None = None

    def __init__(self, *args: Any, pulse: PulseOptConfig | None = None, **kwargs: Any) -> None:
        """Create the Trainer.

        Args:
            *args: the Trainer's.
            pulse: the knobs. `None` takes them from the training arguments where those are
                `PulseOptTrainingArguments`, and else the recommended ones.
            **kwargs: the Trainer's.

        Raises:
            TypeError: `pulse` is not a `PulseOptConfig`.
            ValueError: the knobs were given twice, or the optimizer or engine cannot be adapted.
        """
        if pulse is not None and not isinstance(pulse, PulseOptConfig):
            raise TypeError(f"`pulse` must be a PulseOptConfig, got {type(pulse).__name__}.")
        super().__init__(*args, **kwargs)
        self._pulse = PulseSession(self, pulse)  # type: ignore[arg-type]
        # Looked up anew at each step, so that a subclass or an instance may override it.
        self._pulse.seam = lambda: self.optimizer_step()
        callback = PulseOptCallback(pulse)
        callback.connect(self._pulse)
        self.add_callback(callback)  # type: ignore[attr-defined]

    def optimizer_step(self) -> None:
        """Step the optimizer: the seam that Trainer lacks, called where it calls the bare step.

        Override it to do something before or after, and call `super().optimizer_step()` between:
        it skips the step if it is not finite, and else runs it under the arm.
        """
        self._pulse.optimizer_step()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`."""
        self._pulse.note_resume(*args, **kwargs)
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        except BaseException as error:
            self._pulse.end(error)
            raise
        finally:
            self._pulse.end()

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
        """Write the model card, with a section on the arms; see `Trainer.create_model_card`."""
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        add_section(self)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        # See `upstream.SAVE_CHECKPOINT`.
        self._pulse.agree(*args, **kwargs)
        return super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]


class PulseOptTrainer(PulseOptMixin, Trainer):
    """A Trainer whose learning rate is adapted in episodes; see `PulseOptMixin`."""


class PulseOptSeq2SeqTrainer(PulseOptMixin, Seq2SeqTrainer):
    """A Seq2SeqTrainer whose learning rate is adapted in episodes; see `PulseOptMixin`."""


@functools.cache
def with_pulseopt(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return a subclass of any Trainer class that runs AEES, the same one at every call.

        trainer = with_pulseopt(SFTTrainer)(model, pulse=PulseOptConfig(), ...)

    Raises:
        TypeError: `trainer_class` is not a subclass of Trainer, or has AEES already.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"`trainer_class` must be a subclass of Trainer, got {trainer_class!r}.")
    if issubclass(trainer_class, PulseOptMixin):
        raise TypeError(f"{trainer_class.__name__} has AEES already.")
    return type(
        f"PulseOpt{trainer_class.__name__}",
        (PulseOptMixin, trainer_class),
        {"__doc__": f"{trainer_class.__name__} with AEES.", "__module__": trainer_class.__module__},
    )
