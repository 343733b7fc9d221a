"""Turns labels as files hold them into what a model is trained on, and its outputs back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import ClassLabel

from pulseopt_hf.recipes import models
from pulseopt_hf.recipes.keys import RecipeArguments
from pulseopt_hf.recipes.splits import Split


class Labels:
    """The labels of a recipe: classes, which are indices or names, or the numbers of a regression.

    `of` has the label of each row, for every split but those to predict.
    """

    def __init__(self, recipe: RecipeArguments, splits: list[Split]) -> None:
        self._recipe = recipe
        self._is_regression = recipe.task == "text-regression"
        self._names = [] if self._is_regression else _class_names(recipe, splits)
        self._low, self._high = recipe.label_range or (-math.inf, math.inf)
        indices = range(len(self._names))
        self._index_of: dict[Any, int] = {str(index): index for index in indices}
        self._index_of |= {name: index for index, name in enumerate(self._names)}
        self._index_of |= {index: index for index in indices}
        convert: Callable[[Any], Any] = self._number if self._is_regression else self._index
        if self._is_regression:
            allowed = "a number"
            allowed += f" from {self._low:g} to {self._high:g}" if recipe.label_range else ""
        else:
            known = ", ".join(f"`{name}`" for name in self._names[:8])
            allowed = f"0 to {len(indices) - 1}, or {known}{' ...' if self._names[8:] else ''}"
        self.of = {
            split: split.values(recipe.label_column, convert, allowed)
            for split in splits
            if split.role != "test"
        }

    def load_config(self, **settings: Any) -> Any:
        """Load or make the configuration of a model with a head for these labels."""
        if self._is_regression:
            settings |= {"num_labels": 1, "problem_type": "regression"}
        elif self._names:
            settings |= {
                "num_labels": len(self._names),
                "id2label": dict(enumerate(self._names)),
                "label2id": {name: index for index, name in enumerate(self._names)},
                "problem_type": "single_label_classification",
            }
        config = models.load_config(self._recipe, **settings)
        self._names = self._names or [config.id2label[i] for i in range(config.num_labels)]
        return config

    def predicted(self, logits: Any) -> Any:
        """Return the class, or the number, that a model's outputs say of each row."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return np.squeeze(logits, -1) if self._is_regression else np.argmax(logits, -1)

    def to_lines(self, logits: Any) -> list[str]:
        """Return what is predicted of each row, as it is written into a file."""
        predicted = self.predicted(logits)
        if self._is_regression:
            return [f"{value:.3f}" for value in np.clip(predicted, self._low, self._high)]
        if self._recipe.predict_class_names:
            return [self._names[index] for index in predicted]
        return [str(index) for index in predicted]

    def _index(self, value: Any) -> int:
        if isinstance(value, float):  # 1.0 is the key 1
            raise ValueError
        return self._index_of[value]

    def _number(self, value: Any) -> float:
        converted = float(value)
        if not (math.isfinite(converted) and self._low <= converted <= self._high):
            raise ValueError
        return converted


def _class_names(recipe: RecipeArguments, splits: list[Split]) -> list[str]:
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
