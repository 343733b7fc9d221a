"""Labels and texts as they lie in files, turned into what a model is trained on.

A row that does not fit is named in a `UsageError`.
"""

from __future__ import annotations

import math
from typing import Any

from datasets import ClassLabel

from pulseopt_hf.errors import UsageError
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
    """Return each row's class as an index into `names`, or name the first row that has none."""
    indices = range(len(names))
    index_of: dict[Any, int] = {str(index): index for index in indices}
    index_of |= {name: index for index, name in enumerate(names)}
    index_of |= {index: index for index in indices}
    known = ", ".join(f"`{name}`" for name in names[:8]) + (" ..." if names[8:] else "")
    result = []
    for row, value in enumerate(split.rows[recipe.label_column]):
        found = None if isinstance(value, float) else index_of.get(value)
        if found is None:
            raise _bad_label(recipe, split, row, f"0 to {len(names) - 1}, or {known}")
        result.append(found)
    return result


def label_values(recipe: RecipeArguments, split: Split) -> list[float]:
    """Return each row's label of a regression, or name the first that is not in range."""
    low, high = recipe.label_range or (-math.inf, math.inf)
    bounds = f" from {low:g} to {high:g}" if recipe.label_range else ""
    result = []
    for row, value in enumerate(split.rows[recipe.label_column]):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or not low <= number <= high:
            raise _bad_label(recipe, split, row, f"numbers{bounds}")
        result.append(number)
    return result


def _bad_label(recipe: RecipeArguments, split: Split, row: int, allowed: str) -> UsageError:
    column = recipe.label_column
    return UsageError(
        f"{split.origin}: row {row + 1} has the label {split.rows[row][column]!r} in `{column}`; "
        f"labels are {allowed}."
    )


def texts(split: Split, column: str) -> list[str]:
    """Return a column of texts, or name the first row that has none."""
    values = list(split.rows[column])
    for row, value in enumerate(values):
        if value is None or isinstance(value, dict | list):
            raise UsageError(f"{split.origin}: row {row + 1} has no text in `{column}`.")
    return [str(value) for value in values]
