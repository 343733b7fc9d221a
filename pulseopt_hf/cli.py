"""The command line: `pulseopt-hf`, or `python -m pulseopt_hf`.

Exit codes: 0 done, 1 failed or interrupted, 2 bad usage. Commands that only read recipes load
neither torch nor Transformers.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from pulseopt_hf import __version__
from pulseopt_hf.command_line import COMMANDS, Parser, RecipeCommandParser
from pulseopt_hf.errors import UsageError, nearest, one_line
from pulseopt_hf.recipes import catalogue
from pulseopt_hf.recipes.reading import read_yaml

DONE, FAILED, BAD_USAGE = 0, 1, 2

_ABOUT = "\n".join(f"  {name:<10}{about}" for name, about in COMMANDS.items())
_HELP = f"""\
usage: pulseopt-hf COMMAND ...

Fine-tune with Transformers from a recipe, with the learning rate adapted in episodes.

{_ABOUT}

`pulseopt-hf COMMAND --help` shows what a command takes.

  --debug      show where an error came from; works with every command
  -h, --help   show this help message and exit
  --version    show the version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Raises:
        SystemExit: a command has shown its help, or SIGTERM has ended `watch`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the encoding does not have, or a sign of a plot, must not end a command.
        sys.stdout.reconfigure(errors="replace")
    try:
        return _dispatch(words)
    except UsageError as error:
        if debug:
            traceback.print_exc()
        if _is_first_process():
            for problem in error.problems:
                _complain(f"error: {problem}")
        return BAD_USAGE
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _complain("interrupted.")
        return FAILED
    except BrokenPipeError:
        # The reader has left, as `head` does; what Python flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if debug:
            traceback.print_exc()
        _complain(f"failed: {type(error).__name__}: {one_line(error)}")
        if not debug:
            _complain("Add --debug to see where.")
        return FAILED


def console() -> None:
    """Run the console script `pulseopt-hf`."""
    sys.exit(main())


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_HELP, end="")
        return DONE if words else BAD_USAGE
    if words[0] == "--version":
        print(f"pulseopt-hf {__version__}")
        return DONE
    commands = {"list": _list, "show": _show, "cp": _cp, "validate": _validate, "train": _train}
    commands |= {"find-lr": _find_lr, "compare": _compare}
    commands |= {"report": _report, "plot": _plot, "watch": _watch}
    command = words[0]
    if command.startswith("-"):
        raise UsageError(
            f"Unknown option `{command}`; without a command there are `--help` and `--version`."
        )
    if command not in commands:
        raise UsageError(
            f"Unknown command `{command}`{nearest(command, commands) or '.'} "
            f"Commands are {', '.join(commands)}."
        )
    return commands[command](words[1:])


def _list(words: list[str]) -> int:
    Parser("list").parse_args(words)
    head = ("recipe", "task", "model", "time", "score")
    rows: list[tuple[str, ...]] = [head]
    for name in catalogue.names():
        recipe = read_yaml(catalogue.find(name))
        model = recipe.get("model_name_or_path") or f"new {recipe.get('model_type')}"
        shown = (recipe.get("task"), model, recipe.get("expected_time"))
        rows.append((name, *(str(x or "-") for x in (*shown, recipe.get("expected_score")))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))
    print(f"\nlaunch profiles for `accelerate launch`: {', '.join(catalogue.profiles())}")
    return DONE


def _show(words: list[str]) -> int:
    parser = Parser("show")
    parser.add_argument("recipe", metavar="RECIPE", help="a name from `list`, or a YAML file")
    print(catalogue.find(parser.parse_args(words).recipe).read_text(encoding="utf-8"), end="")
    return DONE


def _cp(words: list[str]) -> int:
    parser = Parser("cp")
    parser.add_argument("recipe", metavar="RECIPE", help="a name from `list`, or a YAML file")
    parser.add_argument("file", metavar="FILE", type=Path, help="the copy, or a folder for it")
    options = parser.parse_args(words)
    source, path = catalogue.find(options.recipe), options.file
    if path.is_dir():
        path = path / source.name
    if path.exists():
        raise UsageError(f"{path}: exists already; choose another name.")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: there is no such folder.")
    shutil.copyfile(source, path)
    print(path)
    return DONE


def _validate(words: list[str]) -> int:
    options, keys = RecipeCommandParser("validate").parse(words)
    catalogue.find(options.recipe)  # a misspelt name need not wait for the imports below
    from pulseopt_hf.recipes.parsing import resolve
    from pulseopt_hf.recipes.running import check

    resolved = resolve(options.recipe, keys)
    check(resolved)
    print(f"`{resolved.path}`: valid.")
    return DONE


class _TrainParser(RecipeCommandParser):
    """Shows the recipe's keys too."""

    def format_help(self) -> str:
        from pulseopt_hf.recipes.parsing import RecipeParser

        self.epilog = None
        return f"{super().format_help()}\n{RecipeParser().format_help()}"


def _train(words: list[str]) -> int:
    parser = _TrainParser("train")
    for flag, about in (
        ("--resume", "go on from the last whole checkpoint of the run folder"),
        ("--overwrite", "replace the run in the run folder"),
        ("--quiet", "write nothing to the screen but errors"),
    ):
        parser.add_argument(flag, action="store_true", help=about)
    options, keys = parser.parse(words)
    if options.resume and options.overwrite:
        raise UsageError("`--resume` goes on with a run and `--overwrite` replaces it; choose one.")
    catalogue.find(options.recipe)
    from pulseopt_hf.recipes.parsing import resolve
    from pulseopt_hf.recipes.running import Interrupted, RunOptions, run

    resolved = resolve(options.recipe, keys)
    command = ("pulseopt-hf", "train", *words)
    try:
        run(resolved, RunOptions(options.resume, options.overwrite, options.quiet, command))
    except Interrupted as error:
        if _is_first_process():
            print(error, file=sys.stderr)
        return FAILED
    return DONE


def _find_lr(words: list[str]) -> int:
    from pulseopt_hf.recipes.find_lr import find_lr

    lines, found = find_lr(words)
    if _is_first_process():
        for line in lines:
            print(line)
    return DONE if found else FAILED


def _compare(words: list[str]) -> int:
    from pulseopt_hf.compare.command import compare

    compare(words)
    return DONE


def _report(words: list[str]) -> int:
    from pulseopt_hf.report.commands import report

    print(report(words))
    return DONE


def _plot(words: list[str]) -> int:
    from pulseopt_hf.report.commands import plot

    for file in plot(words):
        print(file)
    return DONE


def _watch(words: list[str]) -> int:
    from pulseopt_hf.report.watch import watch

    watch(words)
    return DONE


def _complain(line: str) -> None:
    print(f"pulseopt-hf: {line}", file=sys.stderr)


def _is_first_process() -> bool:
    """Whether this is the process that speaks for all that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"
