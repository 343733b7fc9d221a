"""The keys of TRL's tasks: a recipe's, with TRL's config where the others have Trainer's arguments.

Importing it needs TRL.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, get_type_hints

import trl

from pulseopt_hf.recipes.keys import TRL_TASKS, RecipeArguments, RecipeTrainingArguments


def _own_keys(config: Any) -> type:
    """Return a recipe's own keys without those that the config has too."""
    names = {field.name for field in dataclasses.fields(config)}
    shared = [
        (field.name, field.type, dataclasses.field(init=False, default=field.default))
        for field in dataclasses.fields(RecipeArguments)
        if field.name in names
    ]
    return dataclasses.make_dataclass("RecipeArguments", shared, bases=(RecipeArguments,))


def _training_keys(config: Any) -> type:
    """Return the config with the knobs, and with the defaults of a run from a recipe."""
    kinds = get_type_hints(config)
    fields = [
        (field.name, kinds[field.name], copy.copy(field))
        for field in dataclasses.fields(config)
        if field.name not in RecipeTrainingArguments.__annotations__
    ]
    bases = (RecipeTrainingArguments, config)
    made = dataclasses.make_dataclass(config.__name__, fields, bases=bases)
    made.__module__ = __name__
    return made


# Trainer pickles its arguments, so their classes must be found in a module.
CLASSES = {}
for _task, _name in TRL_TASKS.items():
    _config = getattr(trl, f"{_name}Config")
    globals()[_config.__name__] = _training_keys(_config)
    CLASSES[_task] = (_own_keys(_config), globals()[_config.__name__])
