"""What each task makes of its rows: a model, examples, metrics and predictions."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from pulseopt_hf import PulseOptTrainer
from pulseopt_hf.recipes.keys import TASKS, RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.splits import ROLES, Split


@dataclass
class Task:
    """A task whose rows, tokenizer and configuration have been checked."""

    config: Any  # of the model
    processing_class: Any  # the tokenizer or image processor, which is saved with the model
    examples: Callable[[Split], Dataset]  # makes examples of a split's rows
    settings: dict[str, Any]  # of the Trainer, besides these
    # Turns the predictions for a test set into lines, one per example, if the task predicts.
    to_lines: Callable[[Any], list[str]] | None = None
    trainer_class: Callable[..., Any] = PulseOptTrainer
    model: Any = None  # with its weights, once it is loaded; TRL's Trainers load it by themselves
    # The sets of examples of each role, once they are made.
    sets: dict[str, list[Dataset]] = field(default_factory=lambda: {role: [] for role in ROLES})

    def make_trainer(self, training: RecipeTrainingArguments) -> PulseOptTrainer:
        """Build the Trainer of the model, which evaluates on the first validation set.

        TRL's Trainers make examples of the rows that they are given: these are kept.
        """
        trainer = self.trainer_class(
            self.model,
            args=training,
            train_dataset=next(iter(self.sets["train"]), None),
            eval_dataset={str(i): rows for i, rows in enumerate(self.sets["validation"])} or None,
            processing_class=self.processing_class,
            **self.settings,
        )
        self.sets["validation"] = list((trainer.eval_dataset or {}).values())
        trainer.eval_dataset = next(iter(self.sets["validation"]), None)
        made: PulseOptTrainer = trainer
        return made


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Task:
    """Check the rows and make examples of them; loading the model is left to the caller."""
    module = TASKS[recipe.task].module
    task: Task = pkgutil.resolve_name(f"{__name__}.{module}:prepare")(recipe, training, splits)
    for split in splits:
        task.sets[split.role].append(task.examples(split))
    return task
