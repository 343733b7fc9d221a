"""What a person watching a run sees: a line for every trial step and every episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pulseopt_hf.optim import AEES
from pulseopt_hf.report.wording import calibrated_line, episode_line, trial_line


class EpisodeLines(TrainerCallback):
    """Prints a line for a calibration's trial steps and when an episode ends.

    Above a progress bar where there is one.

    Args:
        trainer: a Trainer with AEES.
        write: takes each line.
    """

    def __init__(self, trainer: Trainer, write: Callable[[str], object] = tqdm.write) -> None:
        """See the class."""
        self._trainer = trainer
        self._write = write
        self._printed = 0
        self._trials = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass over what a checkpoint that is resumed has seen."""
        aees = self._aees()
        self._printed = 0 if aees is None else len(aees.controller.records)
        search = None if aees is None else aees.calibration
        self._trials = 0 if search is None else len(search.trials)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the trial that was judged before this step, if one was."""
        aees = self._aees()
        search = None if aees is None else aees.calibration
        if search is None or not state.is_world_process_zero:
            return
        for trial in search.trials[self._trials :]:
            self._trials += 1
            self._write(trial_line(self._trials, trial, args.learning_rate))
            if search.is_done and self._trials == len(search.trials):
                self._write(calibrated_line(search.scale, args.learning_rate, failed=search.failed))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the episode that this step closed, if it closed one."""
        self._print(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the last episode, which may be a partial one."""
        self._print(state)

    def _print(self, state: TrainerState) -> None:
        aees = self._aees()
        if aees is None or not state.is_world_process_zero:
            return
        records = aees.controller.records
        while self._printed < len(records):
            record = records[self._printed]
            self._printed += 1
            self._write(episode_line(self._printed, record, aees.learning_rate))

    def _aees(self) -> AEES | None:
        return getattr(self._trainer, "aees", None)
