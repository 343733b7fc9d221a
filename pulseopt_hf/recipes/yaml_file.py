"""Reads YAML from any source safely: nothing is executed, expanded or guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pulseopt_hf.errors import UsageError, one_line

LARGEST = 64 * 1024  # bytes; the longest shipped recipe has about 2 kB


class _RecipeLoader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1's safe loader with the booleans and numbers of YAML 1.2.

    `no` is the name of a strategy and not false, and `1e-4` is a number and not a word.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and the kind are PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(("bool", "float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases: a few lines of them stand for more values than fit into memory."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise UsageError(
                f"line {event.start_mark.line + 1}: aliases such as `*{event.anchor}` are not "
                "allowed; write the value out."
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that comes twice, of which PyYAML would keep the last."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise UsageError(f"line {line}: keys must be words.")
            if key.value in seen:
                raise UsageError(
                    f"line {line}: `{key.value}` is set twice, before on line {seen[key.value]}; "
                    "keep one of the two."
                )
            seen[key.value] = line
        return dict(super().construct_mapping(node, deep=deep))


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
    """Read a recipe's keys and values, without checking them.

    What is wrong with the file is told in one line that begins with the path.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UsageError(
                f"is {path.stat().st_size:,} bytes long; a recipe has at most {LARGEST:,}."
            )
        value = yaml.load(content.decode("utf-8"), Loader=_RecipeLoader)
        if not isinstance(value, dict):
            kind = "empty" if value is None else f"a {type(value).__name__}"
            raise UsageError(f"is {kind}; a recipe is a mapping, with lines of `key: value`.")
        return value
    except OSError as error:
        problem = f"cannot be read: {error.strerror}."
    except UsageError as error:
        problem = str(error)
    except RecursionError:
        problem = "not valid YAML: nested too deeply."
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = f"{line}not valid YAML: {error.problem}."
    except (yaml.YAMLError, ValueError) as error:
        problem = f"not valid YAML: {one_line(error)}."
    raise UsageError(f"{path}: {problem}")
