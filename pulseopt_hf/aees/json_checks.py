"""State as JSON: the checks that every `load_state_dict` shares. Standard library only.

A state dict holds nothing but what `json.dumps` writes and `json.loads` gives back unchanged. It
may come from a damaged or hostile file, so every value is checked before it is used and every
failure is a `StateError`.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
StateDict = dict[str, Any]
Check = Callable[[object, str], Any]

_MERSENNE_TWISTER = 3  # the version tag of `random.Random.getstate` since Python 3.2
_MERSENNE_WORDS = 625  # 624 words of 32 bits and the position among them


class StateError(ValueError):
    """A saved state cannot be loaded: damaged, of another version, or of other settings."""


def field(state: object, name: str, check: Callable[[object, str], T]) -> T:
    """Return `state[name]` after `check`, or raise `StateError` naming the field."""
    if not isinstance(state, Mapping):
        raise StateError(f"Expected a mapping with `{name}`, got {type(state).__name__}.")
    if name not in state:
        raise StateError(f"The saved state has no `{name}`.")
    return check(state[name], name)


def integer(value: object, name: str) -> int:
    """Accept a whole number >= 0 that fits 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise StateError(f"`{name}` must be a whole number >= 0, got {shorten(value)}.")
    return value


def from_one(value: object, name: str) -> int:
    """Accept a whole number >= 1 that fits 64 bits."""
    if integer(value, name) == 0:
        raise StateError(f"`{name}` counts from 1, got 0.")
    return integer(value, name)


def number(value: object, name: str) -> float:
    """Accept a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StateError(f"`{name}` must be a number, got {shorten(value)}.")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise StateError(f"`{name}` must be finite, got {shorten(value)}.")
    return result


def anything(value: object, name: str) -> object:
    """Accept what is checked elsewhere."""
    return value


def flag(value: object, name: str) -> bool:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise StateError(f"`{name}` must be true or false, got {shorten(value)}.")
    return value


def text(value: object, name: str) -> str:
    """Accept a string."""
    if not isinstance(value, str):
        raise StateError(f"`{name}` must be a string, got {shorten(value)}.")
    return value


def mapping(value: object, name: str) -> dict[str, Any]:
    """Accept a mapping, as JSON has it."""
    if not isinstance(value, dict):
        raise StateError(f"`{name}` must be a mapping, got {shorten(value)}.")
    return value


def optional(check: Callable[[object, str], T]) -> Callable[[object, str], T | None]:
    """Accept `None` as well as what `check` accepts."""
    return lambda value, name: None if value is None else check(value, name)


def list_of(
    check: Callable[[object, str], T], length: int | None = None
) -> Callable[[object, str], list[T]]:
    """Accept a list, of `length` if given, each item passing `check`."""

    def check_list(value: object, name: str) -> list[T]:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise StateError(f"`{name}` must be a list, got {shorten(value)}.")
        if length is not None and len(value) != length:
            raise StateError(f"`{name}` must have {length} items, got {len(value)}.")
        return [check(item, f"{name}[{i}]") for i, item in enumerate(value)]

    return check_list


def dataclass_of(kind: type[T], value: object, **checks: Check) -> T:
    """Rebuild an instance of a dataclass from a mapping of its fields.

    Args:
        kind: the dataclass.
        value: the mapping; it may have other items as well.
        **checks: of fields whose type alone does not say what they may be.

    Raises:
        StateError: a field is missing or of another type.
    """
    wanted = {**checks_of(kind), **checks}
    return kind(**{name: field(value, name, check) for name, check in wanted.items()})


def checks_of(kind: type) -> dict[str, Check]:
    """Return the check of each field of a dataclass, by its type."""
    return {one.name: _CHECKS.get(str(one.type), anything) for one in dataclasses.fields(kind)}


_CHECKS: dict[str, Check] = {
    "int": integer,
    "float": number,
    "bool": flag,
    "str": text,
    "int | None": optional(integer),
    "float | None": optional(number),
    "str | None": optional(text),
    "dict[str, Any]": mapping,
}


def random_to_json(rng: random.Random) -> list[int]:
    """Return a generator's state as 625 whole numbers.

    The controllers draw only with `choice` and `randrange`, which leave the cached second Gaussian
    empty, so the words are all there is.
    """
    return list(rng.getstate()[1])


def random_from_json(value: object, name: str) -> random.Random:
    """Rebuild the generator that `random_to_json` described."""
    words = list_of(integer, _MERSENNE_WORDS)(value, name)
    rng = random.Random()
    try:
        rng.setstate((_MERSENNE_TWISTER, tuple(words), None))
    except (ValueError, OverflowError, TypeError) as error:
        raise StateError(f"`{name}` is not a generator state: {error}.") from error
    return rng


def shorten(value: object, limit: int = 60) -> str:
    """Describe a value in an error message without printing megabytes of it."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, list | tuple | dict) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} items"
    shown = repr(value)
    return shown if len(shown) <= limit else shown[:limit] + "..."
