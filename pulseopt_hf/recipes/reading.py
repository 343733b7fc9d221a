"""YAML that comes from anywhere: read without running, expanding or guessing anything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pulseopt_hf.errors import UsageError, one_line

LARGEST = 64 * 1024  # bytes; the longest shipped recipe has about 2 kB
DEEPEST = 4  # levels of nesting: the recipe, a dictionary, lists inside

_TEXT = "tag:yaml.org,2002:str"


class _RecipeLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1's safe loader with the booleans and numbers of YAML 1.2.

    `no` is the name of a strategy and not false, and `1e-4` is a number and not a word.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and the kind are PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(("bool", "float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that comes twice, of which PyYAML would keep the last."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != _TEXT:
                raise UsageError(f"line {line}: keys must be words.")
            if key.value in seen:
                raise UsageError(
                    f"line {line}: `{key.value}` is set twice, before on line {seen[key.value]}; "
                    "keep one of the two."
                )
            seen[key.value] = line
        result: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return result


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe's keys and values, unchecked.

    Raises:
        UsageError: the file is missing, too large, no YAML, no mapping, or holds anchors, aliases,
            tags, deep nesting or a key twice; each message is one line and begins with the path.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from error
    if len(content) > LARGEST:
        size = path.stat().st_size
        raise UsageError(f"{path}: is {size:,} bytes long; a recipe has at most {LARGEST:,}.")
    try:
        text = content.decode("utf-8")
        _check_events(text)
        value = yaml.load(text, Loader=_RecipeLoader)
    except UsageError as error:
        raise UsageError(*(f"{path}: {problem}" for problem in error.problems)) from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UsageError(f"{path}: {line}not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"{path}: not valid YAML: {one_line(error)}.") from error
    if not isinstance(value, dict):
        kind = "empty" if value is None else f"a {type(value).__name__}"
        raise UsageError(f"{path}: is {kind}; a recipe is a mapping, with lines of `key: value`.")
    return value


def _check_events(text: str) -> None:
    """Look at the file before anything is built from it: that is linear in its size."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:  # of a node, or named by an alias
            raise UsageError(
                f"line {line}: anchors and aliases (`&{event.anchor}`, `*{event.anchor}`) are not "
                "allowed in a recipe; write the value out."
            )
        if getattr(event, "tag", None) is not None:
            raise UsageError(f"line {line}: tags (`{event.tag}`) are not allowed in a recipe.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise UsageError(f"line {line}: nested deeper than {DEEPEST} levels.")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
