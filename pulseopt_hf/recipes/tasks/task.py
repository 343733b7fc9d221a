"""What a task makes of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from pulseopt_hf import PulseOptTrainer
from pulseopt_hf.recipes.keys import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.splits import ROLES, Split


@dataclass
class Task:
    """A task whose rows, tokenizer and configuration have been checked.

    Attributes:
        config: the model's configuration.
        processing_class: the tokenizer or image processor, which is saved with the model.
        examples: makes examples of a split's rows.
        collator: makes, for a model, what makes a batch of examples.
        compute_metrics: Trainer's.
        preprocess_logits: Trainer's `preprocess_logits_for_metrics`.
        to_lines: turns the predictions for a test set into lines, one per example; `None` if the
            task predicts nothing.
        trainer_class: the class of the Trainer.
        model: the model with its weights, once it is loaded.
        sets: the sets of examples of each role, once they are made.
    """

    config: Any
    processing_class: Any
    examples: Callable[[Split], Dataset]
    collator: Callable[[Any], Any]
    compute_metrics: Callable[[Any], dict[str, float]] | None
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    to_lines: Callable[[Any], list[str]] | None = None
    trainer_class: Any = PulseOptTrainer
    model: Any = None
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


def head_settings(recipe: RecipeArguments, names: list[str]) -> dict[str, Any]:
    """Return what the configuration of a classifier has to know about the labels."""
    if recipe.task == "text-regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if not names:
        return {}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def class_lines(recipe: RecipeArguments, names: list[str], indices: Any) -> list[str]:
    """Return predicted classes as they are written into a file."""
    return [names[int(i)] if recipe.predict_class_names else str(int(i)) for i in indices]
