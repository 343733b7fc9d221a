"""The one exception for what a user can put right. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

_Result = TypeVar("_Result")


class UsageError(ValueError):
    """A recipe, a command line, a file or a name is wrong; the run has not begun.

    Args:
        problems: one each, which names the key or file, and the fix. A value that is quoted in one
            may have line breaks; the problem has none.
    """

    def __init__(self, *problems: str) -> None:
        self.problems: Sequence[str] = [" ".join(problem.splitlines()) for problem in problems]
        super().__init__("\n".join(self.problems))


def call_all(calls: Iterable[Callable[[], _Result]]) -> list[_Result]:
    """Make every call and return the results, or raise the problems of all as one `UsageError`."""
    results, problems = [], list[str]()
    for call in calls:
        try:
            results.append(call())
        except UsageError as error:
            problems += error.problems
    if problems:
        raise UsageError(*problems)
    return results


@contextmanager
def usage_error(what: str, kind: type[Exception] = Exception, *, hint: str = "") -> Iterator[None]:
    """Turn an error of a library, by default any, into a `UsageError` of one line."""
    try:
        yield
    except UsageError:
        raise
    except kind as error:
        raise UsageError(f"{what}: {one_line(error)}{hint}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the most similar known name, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{matches[0]}`?" if matches else ""


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, or its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def needs_extra(what: str, extra: str) -> AbstractContextManager[None]:
    """Turn a failed import into a `UsageError` that names the extra to install."""
    return usage_error(f"{what} needs `pip install 'pulseopt-hf[{extra}]'`", ImportError)
