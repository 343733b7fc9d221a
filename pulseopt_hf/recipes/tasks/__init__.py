"""What each task makes of its rows: a model, examples, metrics and predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from pulseopt_hf.recipes import models
from pulseopt_hf.recipes.keys import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.splits import Split
from pulseopt_hf.recipes.tasks import classification, images, language, seq2seq
from pulseopt_hf.recipes.tasks.task import Task

_TASKS: dict[str, Callable[[RecipeArguments, RecipeTrainingArguments, list[Split]], Task]] = {
    "text-classification": classification.prepare,
    "text-regression": classification.prepare,
    "causal-lm": language.prepare,
    "masked-lm": language.prepare,
    "seq2seq": seq2seq.prepare,
    "image-classification": images.prepare,
}


@dataclass
class Prepared:
    """A task, its model with weights, and the examples to train on, to evaluate and to predict."""

    task: Task
    model: Any
    train: Dataset | None
    validation: list[Dataset]
    test: list[Dataset]


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Prepared:
    """Check the rows, make examples of them, and load the model, in this order.

    Raises:
        UsageError: the rows, the tokenizer or the model do not fit the task.
    """
    task = _TASKS[recipe.task](recipe, training, splits)
    of: dict[str, list[Dataset]] = {"train": [], "validation": [], "test": []}
    for split in splits:
        of[split.role].append(task.examples(split))
    model = models.load_model(recipe, task.config)
    return Prepared(task, model, next(iter(of["train"]), None), of["validation"], of["test"])


__all__ = ["Prepared", "prepare"]
