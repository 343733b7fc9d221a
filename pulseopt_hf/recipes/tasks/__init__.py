"""What each task makes of its rows: a model, examples, metrics and predictions."""

from __future__ import annotations

import pkgutil

from pulseopt_hf.recipes.keys import TASKS, RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.splits import Split
from pulseopt_hf.recipes.tasks.task import Task


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Task:
    """Check the rows and make examples of them; loading the model is left to the caller."""
    module = TASKS[recipe.task].module
    task: Task = pkgutil.resolve_name(f"{__name__}.{module}:prepare")(recipe, training, splits)
    for split in splits:
        task.sets[split.role].append(task.examples(split))
    return task


__all__ = ["Task", "prepare"]
