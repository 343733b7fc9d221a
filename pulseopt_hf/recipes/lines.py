"""What a run says while it goes, and what it does when it is told to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from pulseopt_hf.report.wording import described

_RANKS_AGREE_EVERY = 10  # optimizer steps


class Lines:
    """Writes lines to the screen, above a progress bar, and to a file once there is one.

    Args:
        quiet: keep the screen empty.
        silent: write nowhere, as every rank but the first does.
    """

    def __init__(self, *, quiet: bool, silent: bool) -> None:
        self._quiet, self._silent = quiet, silent
        self.file: Path | None = None

    def __call__(self, line: str) -> None:
        """Write one line."""
        if self._silent:
            return
        if not self._quiet:
            tqdm.write(line)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


class Bar(ProgressCallback):
    """Trainer's bar without the dictionary of logs under it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write nothing."""


class EpochLines(TrainerCallback):
    """Writes a line for each epoch and for each evaluation.

    Args:
        write: takes each line.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._seen = 0  # entries of the log history

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the mean of the training losses that were logged in the epoch."""
        entries = [entry for entry in state.log_history[self._seen :] if "loss" in entry]
        self._seen = len(state.log_history)
        if not entries:
            return
        loss = sum(entry["loss"] for entry in entries) / len(entries)
        self._write(
            f"epoch {state.epoch or 0:.3g} of {args.num_train_epochs:g}  step {state.global_step}  "
            f"loss {loss:.3f}  base LR {entries[-1]['learning_rate']:.2e}"
            if args.max_steps < 0
            else f"epoch {state.epoch or 0:.3g}  step {state.global_step}  loss {loss:.3f}"
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the metrics."""
        self._write(f"step {state.global_step}  {described(metrics or {})}")


class Interruption(TrainerCallback):
    """Ends a run at Ctrl-C or SIGTERM with a checkpoint, after the step that is under way.

    A second Ctrl-C ends it at once. Use it as a context manager round `train()`.

    Args:
        trainer: the Trainer.
        write: takes a line for the user.
    """

    def __init__(self, trainer: Trainer, write: Callable[[str], object]) -> None:
        self.happened = False  # the run has been ended
        self._trainer = trainer
        self._write = write
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Listen to the signals."""
        for kind in (signal.SIGINT, signal.SIGTERM):
            self._before[kind] = signal.signal(kind, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Put back who listened before."""
        for kind, before in self._before.items():
            signal.signal(kind, before)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        for kind, before in self._before.items():
            signal.signal(kind, before)
        self._write("Stopping after this step with a checkpoint; Ctrl-C once more stops at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, on all ranks at the same step."""
        stop = self._asked
        if args.world_size > 1:
            # Reading a flag of all ranks takes a device read, so not at every step.
            if state.global_step % _RANKS_AGREE_EVERY:
                return
            accelerator = self._trainer.accelerator
            if stop:
                accelerator.set_trigger()
            stop = accelerator.check_trigger()
        # Resumed from an epoch's last step, Trainer leaves out its evaluation and the random
        # numbers that it draws; so the next step is waited for.
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        if stop and not (ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH):
            self.happened = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out what an epoch would end with: the run does not end here."""
        if self.happened:
            control.should_save = control.should_evaluate = False
