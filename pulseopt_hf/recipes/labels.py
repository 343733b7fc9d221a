"""Turns labels and texts as files hold them into what a model is trained on."""

from __future__ import annotations

import math
from typing import Any

from datasets import ClassLabel

from pulseopt_hf.recipes.keys import RecipeArguments
from pulseopt_hf.recipes.splits import Split


def class_names(recipe: RecipeArguments, splits: list[Split]) -> list[str]:
    """Return the names of the classes: the recipe's, the data set's, or the labels in the files."""
    if recipe.class_names:
        return recipe.class_names
    for split in splits:
        feature = split.rows.features.get(recipe.label_column)
        if isinstance(feature, ClassLabel) and feature.names:
            return list(feature.names)
    if not splits or splits[0].role == "test":
        return []
    values = splits[0].rows.unique(recipe.label_column)
    if all(isinstance(value, int) for value in values):
        return [str(value) for value in range(max(values) + 1)]
    return sorted(str(value) for value in values)


def class_indices(recipe: RecipeArguments, split: Split, names: list[str]) -> list[int]:
    """Return each row's class, an index or a name, as an index into `names`."""
    indices = range(len(names))
    index_of: dict[Any, int] = {str(index): index for index in indices}
    index_of |= {name: index for index, name in enumerate(names)}
    index_of |= {index: index for index in indices}
    known = ", ".join(f"`{name}`" for name in names[:8]) + (" ..." if names[8:] else "")

    def index(value: Any) -> int:
        if isinstance(value, float):  # 1.0 is the key 1
            raise ValueError
        return index_of[value]

    return split.values(recipe.label_column, index, f"0 to {len(names) - 1}, or {known}")


def label_values(recipe: RecipeArguments, split: Split) -> list[float]:
    """Return each row's label of a regression."""
    low, high = recipe.label_range or (-math.inf, math.inf)

    def number(value: Any) -> float:
        converted = float(value)
        if not (math.isfinite(converted) and low <= converted <= high):
            raise ValueError
        return converted

    bounds = f" from {low:g} to {high:g}" if recipe.label_range else ""
    return split.values(recipe.label_column, number, f"a number{bounds}")


def texts(split: Split, column: str) -> list[str]:
    """Return a column of texts."""

    def text(value: Any) -> str:
        if value is None or isinstance(value, dict | list):
            raise ValueError
        return str(value)

    return split.values(column, text, "a text")
