"""What a person watching a run sees: a line for every trial and every episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from pulseopt_hf.aees.calibration import Outcome
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
        self._told: dict[Callable[..., str], int] = {}  # how many of each kind of line

    def on_train_begin(self, *event: Any, **kwargs: Any) -> None:
        """Skip what was printed before the checkpoint that is resumed."""
        self._news()

    def on_step_end(self, *event: Any, **kwargs: Any) -> None:
        """Print what happened in this step: trials, or the end of an episode."""
        for line in self._news():
            self._write(line)

    def on_train_end(self, *event: Any, **kwargs: Any) -> None:
        """Print the last episode, which may be a partial one."""
        self.on_step_end()

    def _news(self) -> list[str]:
        aees: AEES | None = getattr(self._trainer, "aees", None)
        if aees is None or not self._trainer.is_world_process_zero():
            return []
        kinds: list[tuple[Callable[..., str], Sequence[Any]]] = []
        if aees.calibrator is not None:
            kinds += [(trial_line, aees.calibrator.search.trials)]
            kinds += [(_outcome_line, aees.calibrator.outcomes)]
        lines = []
        for to_line, seen in [*kinds, (episode_line, aees.controller.records)]:
            told = self._told.get(to_line, 0)
            lines += [to_line(number, one) for number, one in enumerate(seen[told:], told + 1)]
            self._told[to_line] = len(seen)
        return lines


def _outcome_line(number: int, outcome: Outcome) -> str:
    return str(outcome)
