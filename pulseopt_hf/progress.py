"""What a person watching a run sees: a line for every trial and every episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pulseopt_hf.optim import AEES
from pulseopt_hf.report.wording import episode_line, trial_line


class EpisodeLines(TrainerCallback):
    """Prints a line for each trial of a calibration and for each episode that ends.

    Above a progress bar where there is one.

    Args:
        trainer: a Trainer with AEES.
        write: takes each line.
    """

    def __init__(self, trainer: Trainer, write: Callable[[str], object] = tqdm.write) -> None:
        self._trainer = trainer
        self._write = write
        self._episodes = 0
        self._trials = 0
        self._outcomes = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass over what a checkpoint that is resumed has seen."""
        self._news(lambda line: None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print what this step brought: trials, or an episode that it closed."""
        self._news(self._write)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print the last episode, which may be a partial one."""
        self._news(self._write)

    def _news(self, write: Callable[[str], object]) -> None:
        aees: AEES | None = getattr(self._trainer, "aees", None)
        if aees is None or not self._trainer.is_world_process_zero():
            return
        if aees.calibrator is not None:
            trials, outcomes = aees.calibrator.search.trials, aees.calibrator.outcomes
            for number, trial in enumerate(trials[self._trials :], self._trials + 1):
                write(trial_line(number, trial))
            for outcome in outcomes[self._outcomes :]:
                write(str(outcome))
            self._trials, self._outcomes = len(trials), len(outcomes)
        records = aees.controller.records
        for number, record in enumerate(records[self._episodes :], self._episodes + 1):
            write(episode_line(number, record))
        self._episodes = len(records)
