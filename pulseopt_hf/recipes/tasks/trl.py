"""Chat data, preferences and rewards, with TRL's Trainers. Importing it needs TRL."""

from __future__ import annotations

import copy
import dataclasses
import pkgutil
import runpy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, get_type_hints

import trl

from pulseopt_hf import with_pulseopt
from pulseopt_hf.errors import UsageError, call_all, usage_error
from pulseopt_hf.recipes import models
from pulseopt_hf.recipes.keys import (
    REWARDS,
    TRL_TASKS,
    RecipeArguments,
    RecipeTrainingArguments,
)
from pulseopt_hf.recipes.splits import Split, listed
from pulseopt_hf.recipes.tasks import Task

# The columns that each task reads, of which a split needs one set.
_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("messages",), ("prompt", "completion"), ("conversations",), ("input_ids",)),
    "dpo": (("chosen", "rejected"),),
    "reward": (("chosen", "rejected"),),
    "grpo": (("prompt",),),
}


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Task:
    """Prepare supervised fine-tuning, DPO, a reward model or GRPO."""
    call_all(partial(_need_columns, recipe.task, training, split) for split in splits)
    settings = {"peft_config": models.lora_config(recipe)}
    if recipe.task == "grpo":
        settings["reward_funcs"] = [_reward_function(name) for name in recipe.reward_funcs]
    arguments: Any = training
    arguments.model_init_kwargs = {**models.source(recipe), **(arguments.model_init_kwargs or {})}
    return Task(
        config=models.load_config(recipe),
        processing_class=models.load_tokenizer(recipe),
        examples=lambda split: split.rows,
        settings=settings,
        trainer_class=with_pulseopt(getattr(trl, f"{TRL_TASKS[recipe.task]}Trainer")),
        model=models.model_folder(recipe),
    )


def _need_columns(task: str, training: Any, split: Split) -> None:
    choices = list(_COLUMNS[task])
    if task == "sft":
        choices.append((training.dataset_text_field,))
    there = split.rows.column_names
    if not any(set(choice) <= set(there) for choice in choices):
        wanted = ", or ".join(" and ".join(f"`{name}`" for name in choice) for choice in choices)
        raise UsageError(
            f"{split.origin}: `task: {task}` reads {wanted}, and the columns are "
            f"{listed(there)}. Rename them."
        )


def _reward_function(name: str) -> Callable[..., Any]:
    """Return one of TRL's functions, one of an installed package, or one of a local file."""
    if name in REWARDS and "accuracy" in name and find_spec("math_verify") is None:
        raise UsageError(f"`reward_funcs`: `{name}` needs `pip install 'pulseopt-hf[trl]'`.")
    file, _, function = name.rpartition(":")
    with usage_error(f"`reward_funcs`: `{name}` could not be loaded"):
        if file.endswith(".py"):
            found: Any = runpy.run_path(file).get(function)
        else:
            found = pkgutil.resolve_name(f"trl.rewards.{name}" if name in REWARDS else name)
    if not callable(found):
        raise UsageError(f"`reward_funcs`: `{name}` is not a function.")
    loaded: Callable[..., Any] = found
    return loaded


def _config(name: str) -> type:
    """Return a config of TRL's with the knobs, and with the defaults of a run from a recipe."""
    config = getattr(trl, name)
    kinds = get_type_hints(config)
    fields = [
        (field.name, kinds[field.name], copy.copy(field))
        for field in dataclasses.fields(config)
        if field.name not in RecipeTrainingArguments.__annotations__
    ]
    made = dataclasses.make_dataclass(name, fields, bases=(RecipeTrainingArguments, config))
    made.__module__ = __name__
    return made


# Trainer pickles its arguments, so their classes must be found in a module.
CONFIGS = {task: _config(f"{name}Config") for task, name in TRL_TASKS.items()}
globals().update({config.__name__: config for config in CONFIGS.values()})
