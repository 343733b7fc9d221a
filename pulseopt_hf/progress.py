"""What a person watching a run sees: a line for every trial step and every episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pulseopt_hf.optim import AEES


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
            self._write(
                f"trial {self._trials:>2}  step {trial.step:>3}  "
                f"LR x{trial.scale:<7.3g} = {trial.scale * args.learning_rate:.2e}  "
                f"moved losses by {trial.loss_movement:.2%}, weights by {trial.weight_movement:.2%}"
            )
            if search.is_done and self._trials == len(search.trials):
                found = "not calibrated" if search.failed else "calibrated"
                self._write(
                    f"{found}: learning rate {search.scale * args.learning_rate:.2e}, "
                    f"{search.scale:.3g} times the base LR of {args.learning_rate:.2e}"
                )

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
            learning_rate = aees.learning_rate
            shown = "" if learning_rate is None else f" = {learning_rate:.2e}"
            noise = f"  noise {record.noise_value:g}" if record.noise_value else ""
            self._write(
                f"episode {self._printed:>3}  steps {record.start_step:>4}-{record.end_step:<4}  "
                f"LR x{record.lr_value:<4g}{shown}{noise}  "
                f"loss {record.start_loss:.3f} to {record.end_loss:.3f}  "
                f"reward {record.reward:+.4f}"
            )

    def _aees(self) -> AEES | None:
        return getattr(self._trainer, "aees", None)
