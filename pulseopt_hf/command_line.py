"""The commands, and the parser that all of them use. Standard library only."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from pulseopt_hf.errors import UsageError

COMMANDS = {
    "list": "list every recipe with its task, model, expected time and score",
    "show": "print a recipe or launch profile",
    "cp": "copy a recipe or launch profile, to edit the copy",
    "validate": "check a recipe, its local files and its model, and report every error",
    "train": "run a recipe",
    "find-lr": "find the learning rate for a recipe without training",
    "compare": "compare methods over base LRs and seeds at equal cost",
    "report": "make a page about one run, or about several",
    "plot": "save the page's plots as SVG or PNG files",
    "watch": "follow a run until it ends; print plain lines if the output is not a terminal",
}

# Our options begin with two dashes, so a word with one is a value, such as `-3e-4`. Left alone,
# argparse takes it for an option, unless it is a plain number such as `-3`.
ONE_DASH = re.compile(r"-(?!-)")


class Parser(argparse.ArgumentParser):
    """Parses the words of one of `COMMANDS`; errors are raised as `UsageError`.

    `takes_recipe`: the command takes a recipe and, as further options, the recipe's keys.
    """

    def __init__(self, command: str, *, takes_recipe: bool = False) -> None:
        about = COMMANDS[command]
        super().__init__(
            prog=f"pulseopt-hf {command}",
            usage="%(prog)s RECIPE [--OPTION ...] [--KEY VALUE ...]" if takes_recipe else None,
            description=f"{about[0].upper()}{about[1:]}.",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._negative_number_matcher = ONE_DASH
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if takes_recipe:
            self.add_recipe()
            self.epilog = "A KEY overrides the recipe. `pulseopt-hf train --help` lists every key."

    def add_recipe(self) -> None:
        """Add the argument RECIPE."""
        self.add_argument("recipe", metavar="RECIPE", help="a name from `list`, or a YAML file")

    def parse_recipe(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the command's own options, and the words that set the recipe's keys."""
        if not {"-h", "--help"} & set(words) and (not words or words[0].startswith("-")):
            raise UsageError(f"The recipe comes first: `{self.prog} RECIPE [--KEY VALUE ...]`.")
        return self.parse_known_args(words)

    def error(self, message: str) -> NoReturn:
        """Raise the error as a `UsageError`."""
        message = message.removeprefix("argument ").rstrip(".")
        raise UsageError(f"{message}. `{self.prog} --help` shows how to use it.")


def aligned(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Return rows as lines with aligned columns; `right` aligns all but the last to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    pad = str.rjust if right else str.ljust
    return ["  ".join(map(pad, row, widths)) for row in rows]
