"""A method of one object replaced for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


def wrap(
    patches: ExitStack, target: Any, name: str, make: Callable[[Callable[..., Any]], Any]
) -> None:
    """Replace `target.name` by `make(original)` until `patches` is closed.

    It takes on the original's attributes: schedulers mark the `step` they have seen with one, and
    would warn.
    """
    original = getattr(target, name)
    if name in vars(target):
        patches.callback(setattr, target, name, vars(target)[name])
    else:
        patches.callback(delattr, target, name)
    setattr(target, name, functools.wraps(original)(make(original)))
