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
    collator: Callable[[Any], Any]  # makes, for a model, what makes a batch of examples
    compute_metrics: Callable[[Any], dict[str, float]] | None  # Trainer's
    preprocess_logits: Callable[[Any, Any], Any] | None = None  # Trainer's, `..._for_metrics`
    # Turns the predictions for a test set into lines, one per example, if the task predicts.
    to_lines: Callable[[Any], list[str]] | None = None
    trainer_class: Any = PulseOptTrainer
    model: Any = None  # with its weights, once it is loaded
    # The sets of examples of each role, once they are made.
    sets: dict[str, list[Dataset]] = field(default_factory=lambda: {role: [] for role in ROLES})

    def make_trainer(self, training: RecipeTrainingArguments) -> PulseOptTrainer:
        """Build the Trainer of the model, which evaluates on the first validation set."""
        trainer: PulseOptTrainer = self.trainer_class(
            self.model,
            training,
            data_collator=self.collator(self.model),
            train_dataset=next(iter(self.sets["train"]), None),
            eval_dataset=next(iter(self.sets["validation"]), None),
            processing_class=self.processing_class,
            compute_metrics=self.compute_metrics,
            preprocess_logits_for_metrics=self.preprocess_logits,
        )
        return trainer


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Task:
    """Check the rows and make examples of them; loading the model is left to the caller."""
    module = TASKS[recipe.task].module
    task: Task = pkgutil.resolve_name(f"{__name__}.{module}:prepare")(recipe, training, splits)
    for split in splits:
        task.sets[split.role].append(task.examples(split))
    return task
