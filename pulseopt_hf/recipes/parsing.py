"""From a recipe and a command line to checked arguments: default, then YAML, then command line."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any, get_type_hints

from transformers import HfArgumentParser

from pulseopt_hf.command_line import ONE_DASH
from pulseopt_hf.config import PulseOptKnobs
from pulseopt_hf.errors import UsageError, call_all, nearest, needs_extra, one_line
from pulseopt_hf.recipes import catalogue, models, splits
from pulseopt_hf.recipes.keys import (
    COMMAND_LINE_ONLY,
    TASKS,
    TRL_TASKS,
    RecipeArguments,
    RecipeTrainingArguments,
    problems,
)
from pulseopt_hf.recipes.yaml_file import read_yaml

# Keys whose defaults are Trainer's and may change with its releases.
_PINNED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "optim", "seed"),
    *(field.name for field in dataclasses.fields(PulseOptKnobs)),
)
# A new run has a folder of its own, and only the original recipe takes the expected time.
_NOT_OF_A_RUN = {*COMMAND_LINE_ONLY, "expected_time", "expected_score", "output_dir"}
_PATHS = (
    *("train_file", "validation_file", "test_file", "model_name_or_path", "tokenizer_name"),
    *("deepspeed", "fsdp_config", "chat_template_path", "reward_funcs"),
)


@cache
def recipe_parser(task: str | None = None) -> HfArgumentParser:
    """Return the parser of all keys of a task's recipes, which raises instead of exiting."""
    classes: Any = [RecipeArguments, RecipeTrainingArguments]
    if task in TRL_TASKS:
        with needs_extra(f"`task: {task}`", "trl"):
            from pulseopt_hf.recipes.tasks import trl
        classes[1] = trl.CONFIGS[task]
    parser = HfArgumentParser(
        classes,
        conflict_handler="resolve",  # a key of both is TRL's
        usage=argparse.SUPPRESS,  # it would list every key
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser._optionals.title = "keys of a recipe"
    parser._negative_number_matcher = ONE_DASH
    return parser


def keys_of(parser: HfArgumentParser) -> list[str]:
    """Return the keys that a parser knows, in its order."""
    return list(dict.fromkeys(action.dest for action in parser._actions))


@dataclass
class Resolved:
    """A recipe ready to run."""

    name: str  # as the user named it
    path: Path  # its file
    recipe: RecipeArguments  # the task, the model and the data
    training: RecipeTrainingArguments  # and the knobs; no `output_dir` if the user named none
    given: dict[str, Any]  # what the YAML file and the command line set, converted
    overrides: frozenset[str]  # the keys of these that the command line set


def resolve(name: str, options: Sequence[str]) -> Resolved:
    """Read a recipe, override it by the command line, and check the result.

    All is checked that can be found wrong without the hub, rows or weights. The `UsageError` has a
    line for everything that is wrong, not only the first.
    """
    path = catalogue.find(name)
    if name in catalogue.profiles():
        raise UsageError(
            f"`{name}` is a launch profile: train a recipe with `--accelerate_config {name}`."
        )
    content = read_yaml(path)
    parser = recipe_parser(_task(content, options))
    wrong: list[str] = []
    in_file = _from_yaml(content, parser, wrong)
    overrides = _from_command_line(options, parser, wrong)
    given = {**in_file, **overrides}  # what the command line sets may be wrong in the file
    built: list[Any] = []
    for cls in parser.dataclass_types:
        own = {field.name for field in dataclasses.fields(cls) if field.init} & given.keys()
        try:
            # Trainer's arguments write into the mappings that they are given.
            built.append(cls(**{key: copy.deepcopy(given[key]) for key in own}))
        except (ValueError, TypeError, ImportError) as error:
            wrong += [line for line in str(error).splitlines() if line.strip()]
        except ArithmeticError as error:  # Trainer's own checks compute with what they are given
            wrong.append(f"a number is out of range: {error}.")
        except Exception as error:  # and look into mappings without checking what is in them
            wrong.append(f"Trainer refuses a value: {type(error).__name__}: {one_line(error)}")
    wrong += problems(built[0], given)
    if wrong:
        raise UsageError(*(f"{path}: {problem}" for problem in dict.fromkeys(wrong)))
    recipe, training = built
    call_all([partial(splits.check, recipe, training), partial(models.check, recipe)])
    if "output_dir" not in given:
        training.output_dir = None
    return Resolved(name, path, recipe, training, given, frozenset(overrides))


def _task(content: dict[str, Any], options: Sequence[str]) -> str | None:
    """Return the task of a recipe, on which its keys depend, if it is one of those there are."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--task", default=content.get("task"))
    try:
        task = first.parse_known_args(options)[0].task
    except argparse.ArgumentError:  # which the whole parser tells
        return None
    return task if task in tuple(TASKS) else None


def _from_yaml(
    content: dict[str, Any], parser: HfArgumentParser, wrong: list[str]
) -> dict[str, Any]:
    values, keys = {}, keys_of(parser)
    for key, value in content.items():
        if key not in keys:
            wrong.append(f"unknown recipe key `{key}`{nearest(key, keys) or '.'}")
        elif key in COMMAND_LINE_ONLY and value not in (None, False):
            wrong.append(f"`{key}` can be set on the command line only; leave the line out.")
        else:
            try:
                values[key] = _converted(key, value, parser)
            except UsageError as error:
                wrong += error.problems
    return values


def _converted(key: str, value: Any, parser: HfArgumentParser) -> Any:
    """Turn a value as YAML gives it into what the key's option makes of it."""
    action = parser._option_string_actions[f"--{key}"]
    if isinstance(value, dict):
        hints = [get_type_hints(cls).get(key) for cls in parser.dataclass_types]
        if "dict" in str(hints):
            return value
    if value in (None, []) and value == action.default:
        return value
    if value is None:
        raise UsageError(f"`{key}` has no value; give one, or leave the line out.")
    if isinstance(value, list) and action.nargs != "+":
        raise UsageError(f"`{key}` takes one value, got the list {value!r}.")
    words = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict | list):
            raise UsageError(
                f"`{key}` must not hold {item!r}; put quotes round a text that begins with a "
                "bracket."
            )
        is_whole = action.type is int and isinstance(item, float) and item.is_integer()
        words.append(str(int(item) if is_whole else item))
    try:
        return parser._get_values(action, words)
    except argparse.ArgumentError as error:
        raise UsageError(_refused(key, error)) from error
    except ValueError as error:  # argparse drops the word `--`
        raise UsageError(f"`{key}`: {value!r} is not a value.") from error


def _refused(key: str, error: argparse.ArgumentError) -> str:
    return f"`{key}`: {error.message.rstrip('.')}."


def _from_command_line(
    options: Sequence[str], parser: HfArgumentParser, wrong: list[str]
) -> dict[str, Any]:
    unset = object()
    namespace = argparse.Namespace(**dict.fromkeys(keys_of(parser), unset))
    try:
        _, unknown = parser.parse_known_args(options, namespace)
    except argparse.ArgumentError as error:
        key = str(error.argument_name).split("/")[0].removeprefix("--")
        wrong.append(_refused(key, error))
        return {}
    after_unknown = False
    for word in unknown:
        flag = word.split("=", 1)[0]
        if word.startswith("--"):
            close = nearest(flag, parser._option_string_actions) or "."
            wrong.append(f"unknown option `{flag}`{close}")
            after_unknown = True
        elif not after_unknown:  # else it is the unknown option's value
            wrong.append(f"unexpected `{word}`, which belongs to no option.")
    return {key: value for key, value in vars(namespace).items() if value is not unset}


def to_yaml_values(resolved: Resolved) -> dict[str, Any]:
    """Return the keys that make the same run again.

    These are all that were given, and the settings that matter most for its numbers, so that they
    outlive a change of defaults. Local paths become absolute.
    """
    pinned = {key: getattr(resolved.training, key) for key in _PINNED}
    values = {**resolved.given, **{k: v for k, v in pinned.items() if k not in resolved.given}}
    return {key: _plain(key, value) for key, value in values.items() if key not in _NOT_OF_A_RUN}


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(key, item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if key in _PATHS and isinstance(value, str):
        # A function of a file is `FILE:NAME`.
        file, *name = value.rsplit(":", 1) if key == "reward_funcs" else [value]
        if Path(file).exists():
            return ":".join([str(Path(file).resolve()), *name])
    return value
