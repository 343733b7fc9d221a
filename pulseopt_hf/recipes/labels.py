"""Labels as they lie in files, turned into what a model is trained on."""

from __future__ import annotations

import math
from typing import Any

from datasets import ClassLabel

from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes.data import Part, Parts
from pulseopt_hf.recipes.fields import RecipeArguments


def class_names(recipe: RecipeArguments, parts: Parts) -> list[str]:
    """Return the names of the classes: the recipe's, the data set's, or the labels in the files.

    Returns:
        One name a class, in the order of their indices; none where nothing tells.
    """
    if recipe.class_names:
        return recipe.class_names
    for part in parts.all:
        feature = part.rows.features.get(recipe.label_column)
        if isinstance(feature, ClassLabel) and feature.names:
            return list(feature.names)
    source = parts.train or (parts.validation[0] if parts.validation else None)
    if source is None:
        return []
    values = source.rows.unique(recipe.label_column)
    numbers = [value for value in values if isinstance(value, int)]
    if len(numbers) == len(values):
        return [str(value) for value in range(max(numbers) + 1)]
    return sorted(str(value) for value in values)


def class_indices(recipe: RecipeArguments, part: Part, names: list[str]) -> list[int]:
    """Return each row's class as an index into `names`.

    Raises:
        UsageError: a label is neither an index nor a name; the first such row is named.
    """
    index_of: dict[Any, int] = {name: index for index, name in enumerate(names)}
    for index in range(len(names)):
        index_of.setdefault(str(index), index)
        index_of[index] = index
    result = []
    for row, value in enumerate(part.rows[recipe.label_column]):
        found = None if isinstance(value, float) else index_of.get(value)
        if found is None:
            known = ", ".join(f"`{name}`" for name in names[:8]) + (" ..." if names[8:] else "")
            raise UsageError(
                f"{part.origin}: row {row + 1} has the label {value!r} in `{recipe.label_column}`; "
                f"labels are 0 to {len(names) - 1}, or {known}."
            )
        result.append(found)
    return result


def label_values(recipe: RecipeArguments, part: Part) -> list[float]:
    """Return each row's label of a regression.

    Raises:
        UsageError: a label is no number or out of range; the first such row is named.
    """
    low, high = recipe.label_range or (-math.inf, math.inf)
    result = []
    for row, value in enumerate(part.rows[recipe.label_column]):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or not low <= number <= high:
            bounds = f" from {low:g} to {high:g}" if recipe.label_range else ""
            raise UsageError(
                f"{part.origin}: row {row + 1} has the label {value!r} in `{recipe.label_column}`; "
                f"labels are numbers{bounds}."
            )
        result.append(number)
    return result


def texts(part: Part, column: str) -> list[str]:
    """Return a column of texts.

    Raises:
        UsageError: a row has none.
    """
    values = part.rows[column]
    result = []
    for row, value in enumerate(values):
        if value is None or isinstance(value, dict | list):
            raise UsageError(f"{part.origin}: row {row + 1} has no text in `{column}`.")
        result.append(value if isinstance(value, str) else str(value))
    return result
