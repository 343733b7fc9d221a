"""What each task makes of its rows: a model, examples, metrics and predictions."""

from __future__ import annotations

from collections.abc import Callable

from pulseopt_hf.recipes.data import Parts
from pulseopt_hf.recipes.fields import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.tasks import classification, images, language, seq2seq
from pulseopt_hf.recipes.tasks.prepared import Prepared

_Prepare = Callable[[RecipeArguments, RecipeTrainingArguments, Parts], Prepared]
_PREPARE: dict[str, _Prepare] = {
    "text-classification": classification.prepare,
    "text-regression": classification.prepare,
    "causal-lm": language.prepare,
    "masked-lm": language.prepare,
    "seq2seq": seq2seq.prepare,
    "image-classification": images.prepare,
}


def prepare(recipe: RecipeArguments, training: RecipeTrainingArguments, parts: Parts) -> Prepared:
    """Check the rows, make examples of them, and load the model, in this order.

    Raises:
        UsageError: the rows, the tokenizer or the model do not fit the task.
    """
    return _PREPARE[recipe.task](recipe, training, parts)


__all__ = ["Prepared", "prepare"]
