"""Ctrl-C and SIGTERM: a run ends after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

_RANKS_AGREE_EVERY = 10  # optimizer steps


class Interruption(TrainerCallback):
    """Ends a run at Ctrl-C or SIGTERM with a checkpoint, after the step that is under way.

    A second Ctrl-C ends it at once. Use it as a context manager round `train()`.
    """

    def __init__(self, trainer: Trainer, write: Callable[[str], object]) -> None:
        self.happened = False  # the run has been ended
        self._trainer = trainer
        self._write = write
        self._asked = False
        self._agreed = False  # all ranks have heard of it
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Listen to the signals."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            self._before[kind] = signal.signal(kind, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers from before."""
        for kind, before in self._before.items():
            signal.signal(kind, before)

    def _ask(self, number: int, _: object) -> None:
        if not self._asked:
            self._write(
                "Stopping after this step with a checkpoint; Ctrl-C once more stops at once."
            )
        self._asked = True
        # SIGTERM may come twice, from a scheduler to all processes and from torchrun to its own.
        for kind, before in self._before.items():
            if signal.SIGINT in (kind, number):
                signal.signal(kind, before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, on all ranks at the same step."""
        if args.world_size == 1:
            self._agreed = self._asked
        # Reading a flag of all ranks takes a device read, so not at every step.
        elif not self._agreed and state.global_step % _RANKS_AGREE_EVERY == 0:
            accelerator = self._trainer.accelerator
            if self._asked:
                accelerator.set_trigger()
            self._agreed = accelerator.check_trigger()
        # Resumed from an epoch's last step, Trainer leaves out its evaluation and the random
        # numbers that it draws; so the run ends one step later.
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        if self._agreed and not (ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH):
            self.happened = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave out what would follow an epoch: it has not ended."""
        if self.happened:
            control.should_save = control.should_evaluate = False
