"""What a run writes to the screen and to its log file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import transformers
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from pulseopt_hf import PulseOptTrainer
from pulseopt_hf.aees.calibration import Outcome
from pulseopt_hf.aees.record_format import RunEvent
from pulseopt_hf.recipes.parsing import Resolved
from pulseopt_hf.report.wording import described


class Lines:
    """Writes lines to the screen unless `quiet`, above a progress bar, and to `file` if set."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self.file: Path | None = None

    def __call__(self, line: str) -> None:
        """Write one line."""
        if not self._quiet:
            tqdm.write(line)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


class Bar(ProgressCallback):
    """Trainer's bar without the dictionary of logs under it."""

    def on_log(self, *event: Any, **kwargs: Any) -> None:
        """Write nothing."""


class RunLines(TrainerCallback):
    """Writes a line for each epoch, evaluation, trial of a calibration and episode that ends.

    `outcomes` says whether it also writes what came of a calibration.
    """

    def __init__(
        self, trainer: PulseOptTrainer, write: Callable[[str], object], *, outcomes: bool = True
    ) -> None:
        self._trainer = trainer
        self._write = write
        self._outcomes = outcomes
        self._seen = 0  # entries of the log history

    def on_train_begin(self, *event: Any, **kwargs: Any) -> None:
        """Listen to what comes after the checkpoint that is resumed, if one is."""
        if self._trainer.aees is not None:
            self._trainer.aees.listeners.append(self._on_event)

    def _on_event(self, event: RunEvent) -> None:
        if self._outcomes or not isinstance(event, Outcome):
            self._write(str(event))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, *event: Any, **kwargs: Any
    ) -> None:
        """Write the mean of the training losses that were logged in the epoch."""
        entries = [entry for entry in state.log_history[self._seen :] if "loss" in entry]
        self._seen = len(state.log_history)
        if not entries:
            return
        loss = sum(entry["loss"] for entry in entries) / len(entries)
        of, rate = "", ""
        if args.max_steps < 0:
            of = f" of {args.num_train_epochs:g}"
            rate = f"  base LR {entries[-1]['learning_rate']:.2e}"
        epoch = f"epoch {state.epoch or 0:.3g}{of}"
        self._write(f"{epoch}  step {state.global_step}  loss {loss:.3f}{rate}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, *event: Any, **kwargs: Any
    ) -> None:
        """Write the metrics, unless the same model is evaluated once more in the end."""
        if state.global_step < state.max_steps or args.load_best_model_at_end:
            self._write(f"step {state.global_step}  {described(kwargs.get('metrics') or {})}")


def quiet_libraries(resolved: Resolved, *, quiet: bool = False) -> None:
    """Leave the screen to the run's own lines; `quiet` shows no progress bar either."""
    training = resolved.training
    if "log_level" not in resolved.given:
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if "disable_tqdm" not in resolved.given:
        # In a file a bar is thousands of lines.
        training.disable_tqdm = quiet or not sys.stderr.isatty()
    if training.disable_tqdm:
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        datasets.disable_progress_bars()


@contextmanager
def without_calibration_log() -> Iterator[None]:
    """Keep the outcome of a calibration out of the log: the run's own lines tell it."""
    logger = logging.getLogger("pulseopt_hf.calibration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
