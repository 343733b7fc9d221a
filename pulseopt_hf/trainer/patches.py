"""Methods of one object replaced for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class MethodPatches:
    """Replaces methods on instances and puts back what was there."""

    def __init__(self) -> None:
        """Start with nothing replaced."""
        self._undo: list[Callable[[], None]] = []

    def wrap(self, target: Any, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
        """Replace `target.name` by `make(original)`, which takes on the original's attributes.

        Schedulers mark the `step` they have seen with such an attribute, and would warn.
        """
        original = getattr(target, name)
        own = vars(target).get(name)
        setattr(target, name, functools.wraps(original)(make(original)))

        def undo() -> None:
            if own is None:
                delattr(target, name)
            else:
                setattr(target, name, own)

        self._undo.append(undo)

    def add(self, undo: Callable[[], None]) -> None:
        """Have something else undone with the rest."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Put everything back, latest first."""
        while self._undo:
            self._undo.pop()()
