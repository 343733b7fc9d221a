"""From a recipe and a command line to checked arguments: default, then YAML, then command line."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser

from pulseopt_hf.command_line import ONE_DASH
from pulseopt_hf.config import PulseOptKnobs
from pulseopt_hf.errors import UsageError, nearest
from pulseopt_hf.recipes import catalogue
from pulseopt_hf.recipes.fields import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.reading import read_yaml

_CLASSES = (RecipeArguments, RecipeTrainingArguments)
_MAPPINGS = {
    key for cls in _CLASSES for key, kind in get_type_hints(cls).items() if "dict" in str(kind)
}
COMMAND_LINE_ONLY = ("trust_remote_code", "hub_token", "resume_from_checkpoint")


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` over all keys of a recipe, which raises instead of exiting."""

    def __init__(self) -> None:
        """Add an option for every key."""
        classes: Any = _CLASSES  # upstream's type variable fits no class at all
        # A usage would be a list of all keys.
        super().__init__(classes, usage=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
        self._optionals.title = "keys of a recipe"
        self._negative_number_matcher = ONE_DASH

    def error(self, message: str) -> NoReturn:
        """Raise the error as a `UsageError`."""
        message = re.sub(r"^argument --(\w+)(/--[\w-]+)*:", r"`\1`:", message)
        raise UsageError(message if message.endswith(".") else f"{message}.")

    @property
    def keys(self) -> list[str]:
        """All keys that a recipe may have."""
        return [field.name for cls in _CLASSES for field in dataclasses.fields(cls) if field.init]

    def convert(self, key: str, value: Any) -> Any:
        """Turn a value as YAML gives it into what the key's option makes of it.

        Raises:
            UsageError: it does not fit the key.
        """
        action = self._option_string_actions[f"--{key}"]
        if value is None:
            if action.default is None:
                return None
            raise UsageError(f"`{key}` has no value; give one, or leave the line out.")
        if isinstance(value, dict) and key in _MAPPINGS:
            return value
        if isinstance(value, list):
            if action.nargs != "+":
                raise UsageError(f"`{key}` takes one value, got the list {value!r}.")
            if not value and action.default == []:
                return []
        values = value if isinstance(value, list) else [value]
        for item in values:
            if isinstance(item, dict | list):
                raise UsageError(
                    f"`{key}` must not hold {item!r}; put quotes round a text that begins with a "
                    "bracket."
                )
        try:
            words = [f"--{key}={_word(values[0], action.type)}"] if len(values) == 1 else None
            if words is None:
                words = [f"--{key}", *(_word(item, action.type) for item in values)]
            return getattr(self.parse_args(words), key)
        except UsageError as error:
            problem = str(error).split(": ", 1)[-1]
            raise UsageError(f"`{key}`: {problem}") from None


@dataclass
class Resolved:
    """A recipe ready to run.

    Attributes:
        name: how the user named it.
        path: its file.
        recipe: what is trained on which data.
        training: Trainer's arguments and the knobs; `output_dir` is `None` where the user named
            none.
        given: what the YAML file and the command line set, as their options convert it.
        said: the keys of these that the command line set.
    """

    name: str
    path: Path
    recipe: RecipeArguments
    training: RecipeTrainingArguments
    given: dict[str, Any]
    said: frozenset[str]


def resolve(name: str, options: list[str], parser: RecipeParser | None = None) -> Resolved:
    """Read a recipe, lay the command line over it, and check the result.

    Args:
        name: a shipped recipe's name or a file's path.
        options: the command line's `--key value` words.
        parser: one that knows further options, which are left to its owner.

    Raises:
        UsageError: with a line for everything that is wrong, not only the first.
    """
    path = catalogue.find(name)
    if name in catalogue.profiles():
        raise UsageError(
            f"`{name}` is a launch profile: `accelerate launch --config_file FILE`, with the FILE "
            f"that `pulseopt-hf cp {name} FILE` writes."
        )
    parser = parser or RecipeParser()
    values, problems = _from_yaml(path, parser)
    command, wrong = _from_command_line(options, parser)
    problems += wrong
    # What the command line sets need not be right in the file.
    merged = {**values, **command}
    built: list[Any] = []
    for cls in _CLASSES:
        keys = {field.name for field in dataclasses.fields(cls) if field.init}
        try:
            # Trainer's arguments write into the mappings that they are given.
            own = {key: copy.deepcopy(merged[key]) for key in merged if key in keys}
            built.append(cls(**own))
        except UsageError as error:
            problems += error.problems
        except (ValueError, TypeError, ImportError) as error:
            problems += [line for line in str(error).splitlines() if line.strip()]
        except ArithmeticError as error:  # Trainer's own checks compute with what they are given
            problems.append(f"a number is out of all range: {error}.")
    if problems:
        raise UsageError(*(f"{path}: {problem}" for problem in dict.fromkeys(problems)))
    training = built[1]
    if "output_dir" not in merged:
        training.output_dir = None
    return Resolved(name, path, built[0], training, merged, frozenset(command))


def _from_yaml(path: Path, parser: RecipeParser) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in read_yaml(path).items():
        if key not in parser.keys:
            problems.append(f"unknown recipe key `{key}`{nearest(key, parser.keys) or '.'}")
        elif key in COMMAND_LINE_ONLY and value not in (None, False):
            problems.append(f"`{key}` can be set on the command line only; leave the line out.")
        else:
            try:
                values[key] = parser.convert(key, value)
            except UsageError as error:
                problems += error.problems
    return values, problems


def _from_command_line(
    options: list[str], parser: RecipeParser
) -> tuple[dict[str, Any], list[str]]:
    """Return only what the command line names, found by suppressing all defaults."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    try:
        namespace, unknown = parser.parse_known_args(options)
    except UsageError as error:
        return {}, list(error.problems)
    known = [word for action in parser._actions for word in action.option_strings]
    problems = []
    after_unknown = False
    for word in unknown:
        flag = word.split("=", 1)[0]
        if word.startswith("--"):
            problems.append(f"unknown option `{flag}`{nearest(flag, known) or '.'}")
            after_unknown = True
        elif not after_unknown:  # else it is that option's value, of which all is said
            problems.append(f"unexpected `{word}`, which belongs to no option.")
    return vars(namespace), problems


def _word(value: Any, kind: Any) -> str:
    """Write a YAML value as a command line would hold it."""
    if isinstance(value, float) and value.is_integer() and kind is int:
        return str(int(value))
    return str(value)


def to_yaml_values(resolved: Resolved) -> dict[str, Any]:
    """Return the keys that make the same run again.

    These are all that were given, and the settings on which its numbers hang most, so that they
    outlive a change of defaults. Local paths become absolute. Left out are the run folder, which a
    new run has to itself, what is resumed, and what only a command line may hold.
    """
    knobs = [field.name for field in dataclasses.fields(PulseOptKnobs)]
    values = {**resolved.given}
    for key in (*_PINNED, *knobs):
        values.setdefault(key, getattr(resolved.training, key))
    left_out = {*COMMAND_LINE_ONLY, *_FOR_THE_SHELF, "output_dir"}
    return {key: _plain(key, value) for key, value in values.items() if key not in left_out}


# Keys whose defaults are Trainer's and may change with its releases.
_PINNED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "optim", "seed"),
)
_FOR_THE_SHELF = frozenset({"expected_time", "expected_score"})  # true of the original only
_PATHS = frozenset(
    {"train_file", "validation_file", "test_file", "model_name_or_path", "tokenizer_name"}
    | {"deepspeed", "fsdp_config"}
)


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(key, item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if key in _PATHS and isinstance(value, str) and Path(value).exists():
        return str(Path(value).resolve())
    return value
