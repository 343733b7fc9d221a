"""Usage errors: collected, so that a user sees all of them at once, or made of other errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pulseopt_hf.errors import UsageError, one_line


class Problems:
    """Collects the usage errors of its `with` blocks."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __enter__(self) -> None:
        """Begin a block."""

    def __exit__(self, kind: object, error: object, traceback: object) -> bool:
        """Keep a usage error for `raise_any`."""
        if isinstance(error, UsageError):
            self.lines += error.problems
        return isinstance(error, UsageError)

    def raise_any(self) -> None:
        """Raise everything that was collected as one `UsageError`."""
        if self.lines:
            raise UsageError(*self.lines)


@contextmanager
def usage_error(what: str, kind: type[Exception] = Exception, *, hint: str = "") -> Iterator[None]:
    """Turn an error of a library, by default any, into a `UsageError` of one line."""
    try:
        yield
    except UsageError:
        raise
    except kind as error:
        raise UsageError(f"{what}: {one_line(error)}{hint}") from error
