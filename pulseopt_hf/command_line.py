"""What the commands share: what each is for, and how its words are read. Standard library only."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from pulseopt_hf.errors import UsageError

COMMANDS = {
    "list": "show every recipe: task, model, expected time and score",
    "show": "print the YAML of a recipe or launch profile",
    "cp": "copy a recipe or launch profile, to change it",
    "validate": "check a recipe and what it names here, and show everything that is wrong",
    "train": "run a recipe",
    "find-lr": "find the learning rate for a recipe by a few steps that are put back",
    "compare": "compare methods over base LRs and seeds, at equal cost",
    "report": "make a page on a run, or on several beside each other",
    "plot": "save the page's plots as SVG or PNG files",
    "watch": "follow a run while it goes; as plain lines where the output is no terminal",
}

# Our options begin with two dashes, so a word with one is a value, such as `-3e-4`. Left alone,
# argparse takes it for an option, unless it is a plain number such as `-3`.
ONE_DASH = re.compile(r"-(?!-)")


class Parser(argparse.ArgumentParser):
    """The parser of one command, which raises instead of exiting.

    Args:
        command: its name, one of `COMMANDS`.
        settings: what argparse takes besides.
    """

    def __init__(self, command: str, **settings: Any) -> None:
        about = COMMANDS[command]
        super().__init__(
            prog=f"pulseopt-hf {command}",
            description=f"{about[0].upper()}{about[1:]}.",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )
        self._negative_number_matcher = ONE_DASH

    def error(self, message: str) -> NoReturn:
        """Raise the error as a `UsageError`."""
        message = message.removeprefix("argument ").rstrip(".")
        raise UsageError(f"{message}. `{self.prog} --help` shows how to use it.")


class RecipeCommandParser(Parser):
    """The parser of a command that takes a recipe and, as further options, the recipe's keys."""

    def __init__(self, command: str) -> None:
        super().__init__(command, usage="%(prog)s RECIPE [--OPTION ...] [--KEY VALUE ...]")
        self.epilog = (
            "A KEY overrides the recipe's line. `pulseopt-hf train --help` describes every key."
        )
        self.add_argument("recipe", metavar="RECIPE", help="a name from `list`, or a YAML file")

    def parse(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the command's own options, and the words that are left for the recipe's keys."""
        if not {"-h", "--help"} & set(words) and (not words or words[0].startswith("-")):
            raise UsageError(f"The recipe comes first: `{self.prog} RECIPE [--KEY VALUE ...]`.")
        return self.parse_known_args(words)
