"""What each task makes of its rows: a model, examples, metrics and predictions."""

from __future__ import annotations

from collections.abc import Callable

from pulseopt_hf.recipes.keys import TRL_TASKS, RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.splits import Split
from pulseopt_hf.recipes.tasks import classification, images, language, seq2seq, trl
from pulseopt_hf.recipes.tasks.task import Task

_TASKS: dict[str, Callable[[RecipeArguments, RecipeTrainingArguments, list[Split]], Task]] = {
    "text-classification": classification.prepare,
    "text-regression": classification.prepare,
    "causal-lm": language.prepare,
    "masked-lm": language.prepare,
    "seq2seq": seq2seq.prepare,
    "image-classification": images.prepare,
    **dict.fromkeys(TRL_TASKS, trl.prepare),
}


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Task:
    """Check the rows and make examples of them; loading the model is left to the caller."""
    task = _TASKS[recipe.task](recipe, training, splits)
    for split in splits:
        task.sets[split.role].append(task.examples(split))
    return task


__all__ = ["Task", "prepare"]
