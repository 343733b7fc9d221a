"""Nested containers of tensors: mapped, and taken apart into tensors and JSON for a file."""

from __future__ import annotations

import copy
import json
from collections import UserDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pulseopt_hf.aees.json_checks import StateError

_CONTENT = "content"


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested dicts, lists and tuples with `change` applied to every tensor.

    Other leaves are handed on as they are.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict | UserDict):  # of any class, as tokenizers return theirs
        result = copy.copy(tree)
        for key, value in tree.items():
            result[key] = map_tensors(value, change)
        return result
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, change) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


def take_apart(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Put the tensors of a tree into `tensors` under names that begin with `name`.

    Returns:
        What is left, which `put_together` needs. It is JSON if the other leaves are.
    """
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict | UserDict):
        items = enumerate(tree.items())
        return {"dict": [[k, take_apart(v, f"{name}.{i}", tensors)] for i, (k, v) in items]}
    if isinstance(tree, list | tuple):
        parts = [take_apart(value, f"{name}.{i}", tensors) for i, value in enumerate(tree)]
        return {"tuple" if isinstance(tree, tuple) else "list": parts}
    return {"leaf": copy.deepcopy(tree)}


def put_together(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild what `take_apart` took apart."""
    if "tensor" in rest:
        return tensors[rest["tensor"]]
    if "dict" in rest:
        return {key: put_together(value, tensors) for key, value in rest["dict"]}
    if "leaf" in rest:
        return copy.deepcopy(rest["leaf"])
    if "tuple" in rest:
        return tuple(put_together(value, tensors) for value in rest["tuple"])
    return [put_together(value, tensors) for value in rest["list"]]


def save(path: Path, tensors: Mapping[str, Tensor], rest: Any) -> None:
    """Write tensors and JSON as one safetensors file.

    Raises:
        TypeError: `rest` holds something that JSON has no word for.
    """
    content = {_CONTENT: json.dumps(rest)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, content)


def load(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read what `save` wrote.

    Raises:
        StateError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, json.loads((file.metadata() or {})[_CONTENT])
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise StateError(f"{path} cannot be read: {error}") from error
