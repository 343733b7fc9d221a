"""The command line: `pulseopt-hf`, or `python -m pulseopt_hf`.

Exit codes: 0 success, 1 failure or interruption, 2 bad usage. A command parses its own words and
imports what it needs when it is called, so `list` and `show` load neither torch nor Transformers.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from pulseopt_hf import __version__
from pulseopt_hf.command_line import COMMANDS, Parser, aligned
from pulseopt_hf.errors import UsageError, nearest, one_line
from pulseopt_hf.recipes import catalogue, launching
from pulseopt_hf.recipes.yaml_file import read_yaml

DONE, FAILED, BAD_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; help, and SIGTERM in `watch`, raise `SystemExit`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words.sort(key="--debug".__eq__)  # it may stand anywhere, and goes last
    return guarded(lambda: _run(words), debug="--debug" in words)


def guarded(command: Callable[[], int | None], *, debug: bool = False) -> int:
    """Return a command's exit code; print in a line or two what it raises, or all with `debug`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding lacks must not end a command.
        sys.stdout.reconfigure(errors="replace")
    try:
        return command() or DONE
    except BrokenPipeError:
        # The reader has left, as `head` does; what Python flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        return _report_error(error, debug=debug)


def _report_error(error: BaseException, *, debug: bool) -> int:
    """Print an error, and return the exit code."""
    if debug:
        traceback.print_exc()
    if isinstance(error, UsageError):
        lines = [f"error: {problem}" for problem in error.problems if _is_first_process()]
    elif isinstance(error, KeyboardInterrupt):
        lines = [str(error) or "interrupted."]
    else:
        lines = [f"failed: {type(error).__name__}: {one_line(error)}"]
        lines += [] if debug else ["Add --debug to see where."]
    for line in lines:
        print(f"pulseopt-hf: {line}", file=sys.stderr)
    return BAD_USAGE if isinstance(error, UsageError) else FAILED


def _is_first_process() -> bool:
    """Whether this process speaks for all that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def _run(words: list[str]) -> int | None:
    first = words[0] if words else "--help"
    own = {"list": _list, "show": _show, "cp": _cp, "validate": _validate, "train": _train}
    if first in own:
        return own[first](words[1:])
    if first in COMMANDS:
        return _run_elsewhere(first, words[1:])
    if first not in ("-h", "--help", "--version"):
        raise UsageError(
            f"Unknown {'option' if first.startswith('-') else 'command'} `{first}`"
            f"{nearest(first, COMMANDS) or '.'} `pulseopt-hf --help` lists the commands."
        )
    parser = argparse.ArgumentParser(
        prog="pulseopt-hf",
        description="Fine-tune with Transformers from a recipe, with a calibrated learning rate.",
        epilog="`pulseopt-hf COMMAND --help` describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, about in COMMANDS.items():
        commands.add_parser(name, help=about)
    parser.parse_args(words)  # which shows help or the version, and exits
    parser.print_help()
    return BAD_USAGE


def _list(words: list[str]) -> None:
    Parser("list").parse_args(words)
    rows: list[tuple[str, ...]] = [("recipe", "task", "model", "time", "score")]
    for name in catalogue.names():
        recipe = read_yaml(catalogue.find(name))
        model = recipe.get("model_name_or_path") or f"new {recipe.get('model_type')}"
        shown = (recipe.get("task"), model, recipe.get("expected_time"))
        rows.append((name, *(str(x or "-") for x in (*shown, recipe.get("expected_score")))))
    head, *lines = aligned(rows)
    print(head)
    for _, group in groupby(lines, lambda line: line.split("/")[0]):
        print("", *group, sep="\n")
    print(f"\nlaunch profiles for `--accelerate_config`: {', '.join(catalogue.profiles())}")
    print(f"several nodes of Slurm: {catalogue.SLURM}")


def _show(words: list[str]) -> None:
    parser = Parser("show")
    parser.add_recipe()
    print(catalogue.find(parser.parse_args(words).recipe).read_text(encoding="utf-8"), end="")


def _cp(words: list[str]) -> None:
    parser = Parser("cp")
    parser.add_recipe()
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


def _validate(words: list[str]) -> None:
    options, keys = Parser("validate", takes_recipe=True).parse_recipe(words)
    catalogue.find(options.recipe)  # before the slow imports, for a misspelt name
    from pulseopt_hf.recipes.parsing import resolve

    print(f"`{resolve(options.recipe, keys).path}`: valid.")


def _train(words: list[str]) -> int:
    parser = Parser("train", takes_recipe=True)
    for flag, about in (
        ("--resume", "continue from the last whole checkpoint in the run folder"),
        ("--overwrite", "replace the run in the run folder"),
        ("--quiet", "print errors only"),
    ):
        parser.add_argument(flag, action="store_true", help=about)
    launching.add_options(parser)
    if {"-h", "--help"} & set(words):
        from pulseopt_hf.recipes.parsing import recipe_parser

        recipe = {} if words[0].startswith("-") else read_yaml(catalogue.find(words[0]))
        parser.epilog = recipe_parser(recipe.get("task")).format_help()
    options, keys = parser.parse_recipe(words)
    if options.resume and options.overwrite:
        raise UsageError("`--resume` continues a run and `--overwrite` replaces it; choose one.")
    catalogue.find(options.recipe)
    launched = launching.launch(options, ["train", *words])
    if launched is not None:
        return launched
    from pulseopt_hf.recipes.parsing import resolve
    from pulseopt_hf.recipes.running import run

    asked = {flag: getattr(options, flag) for flag in ("resume", "overwrite", "quiet")}
    with ExitStack() as stack:
        stack.push(launching.leave_ranks)
        stopped = run(resolve(options.recipe, keys), ["pulseopt-hf", "train", *words], **asked)
    if stopped is not None and _is_first_process():
        print(stopped, file=sys.stderr)
    return DONE if stopped is None else FAILED


def _run_elsewhere(command: str, words: list[str]) -> int:
    """Run a command that has a module of its own."""
    if command == "find-lr":
        from pulseopt_hf.recipes.find_lr import find_lr

        return DONE if find_lr(words) else FAILED
    if command == "compare":
        from pulseopt_hf.compare.compare import compare

        compare(words)
    elif command == "watch":
        from pulseopt_hf.report.watch import watch

        watch(words)
    else:
        from pulseopt_hf.report.commands import plot, report

        print(*([report(words)] if command == "report" else plot(words)), sep="\n")
    return DONE
