"""The command line: `pulseopt-hf`, or `python -m pulseopt_hf`.

Exit codes: 0 done, 1 failed or interrupted, 2 bad usage. Commands that only read recipes load
neither torch nor Transformers.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from pulseopt_hf import __version__
from pulseopt_hf.recipes import catalogue
from pulseopt_hf.recipes.errors import UsageError, nearest, one_line
from pulseopt_hf.recipes.reading import read_yaml

DONE, FAILED, BAD_USAGE = 0, 1, 2

_HELP = """\
usage: pulseopt-hf COMMAND ...

Fine-tune with Transformers from a recipe, with the learning rate adapted in episodes.

  list                              every recipe: task, model, expected time and score
  show RECIPE                       print the YAML of a recipe or launch profile
  cp RECIPE FILE                    copy it, to change it
  validate RECIPE [--KEY VALUE ...] check a recipe, and say all that is wrong with it at once
  train RECIPE [--KEY VALUE ...]    run a recipe; a key overrides the recipe's line
  compare RECIPE [--KEY VALUE ...]  does it help? methods, base LRs and seeds at equal cost
  report RUN [RUN ...]              a page on a run, or on several beside each other
  plot RUN [RUN ...]                the page's plots as SVG or PNG files
  watch RUN                         follow a run while it goes; plain lines where no terminal is

RECIPE is a name that `list` shows, or the path of a YAML file. RUN is a run's folder.

options of every command:
  --debug      show where an error came from
  -h, --help   show this, or after `train` every key
  --version    show the version

options of train:
  --resume     go on from the last whole checkpoint of the run folder
  --overwrite  replace the run in the run folder
  --quiet      write nothing to the screen but errors

options of compare:
  --methods         of static, random, published, default, calibrated, greedy, schedule_free,
                    prodigy; with commas between
  --learning_rates  base LRs, with commas between
  --seeds           seeds, with commas between
  --steps           optimizer steps of a run, 600 by default
  --out             folder for the results; what is there already is not run again

options of report:
  --out        the page's file; by default report.html, in the run's folder if there is one run

options of plot:
  --out        folder for the pictures; by default plots, in the run's folder if there is one run
  --format     svg or png
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
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
    commands |= {"compare": _compare, "report": _report, "plot": _plot, "watch": _watch}
    command, rest = words[0], words[1:]
    if command not in commands:
        raise UsageError(
            f"`{command}` is no command{nearest(command, commands) or '.'} "
            f"Commands are {', '.join(commands)}."
        )
    if rest and rest[0] in ("-h", "--help"):
        print(_HELP, end="")
        if command in ("train", "validate"):
            from pulseopt_hf.recipes.parsing import RecipeParser

            print("\nkeys of a recipe:\n" + RecipeParser().format_help())
        return DONE
    return commands[command](rest)


def _list(words: list[str]) -> int:
    _expect(words, 0, "list")
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
    (name,) = _expect(words, 1, "show RECIPE")
    print(catalogue.find(name).read_text(encoding="utf-8"), end="")
    return DONE


def _cp(words: list[str]) -> int:
    name, target = _expect(words, 2, "cp RECIPE FILE")
    source, path = catalogue.find(name), Path(target)
    if path.is_dir():
        path = path / source.name
    if path.exists():
        raise UsageError(f"{path}: is there already; choose another name.")
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: there is no such folder.")
    shutil.copyfile(source, path)
    print(path)
    return DONE


def _validate(words: list[str]) -> int:
    name, options = _recipe_and_options(words, "validate")
    from pulseopt_hf.recipes.parsing import resolve

    resolved = resolve(name, options)
    print(f"{resolved.path}: right.")
    return DONE


def _train(words: list[str]) -> int:
    name, options = _recipe_and_options(words, "train")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--resume", "--overwrite", "--quiet"):
        own.add_argument(flag, action="store_true")
    flags, options = own.parse_known_args(options)
    if flags.resume and flags.overwrite:
        raise UsageError("`--resume` goes on with a run and `--overwrite` replaces it; choose one.")
    catalogue.find(name)  # a misspelt name need not wait for the imports below
    from pulseopt_hf.recipes.parsing import resolve
    from pulseopt_hf.recipes.running import Interrupted, RunOptions, run

    resolved = resolve(name, options)
    command = ("pulseopt-hf", "train", *words)
    try:
        run(resolved, RunOptions(flags.resume, flags.overwrite, flags.quiet, command))
    except Interrupted as error:
        if _is_first_process():
            print(f"{error}.", file=sys.stderr)
        return FAILED
    return DONE


def _compare(words: list[str]) -> int:
    name, options = _recipe_and_options(words, "compare")
    from pulseopt_hf.compare.command import compare

    compare(name, options)
    return DONE


def _report(words: list[str]) -> int:
    from pulseopt_hf.report.command import report

    print(report(words))
    return DONE


def _plot(words: list[str]) -> int:
    from pulseopt_hf.report.command import plot

    for file in plot(words):
        print(file)
    return DONE


def _watch(words: list[str]) -> int:
    from pulseopt_hf.report.watch import watch

    watch(words)
    return DONE


def _recipe_and_options(words: list[str], command: str) -> tuple[str, list[str]]:
    if not words or words[0].startswith("-"):
        raise UsageError(
            f"The recipe comes first: `pulseopt-hf {command} RECIPE [--KEY VALUE ...]`."
        )
    return words[0], words[1:]


def _expect(words: list[str], count: int, usage: str) -> list[str]:
    if len(words) != count:
        raise UsageError(
            f"The command is `pulseopt-hf {usage}`, got {' '.join(words) or 'no more'}."
        )
    return words


def _complain(line: str) -> None:
    print(f"pulseopt-hf: {line}", file=sys.stderr)


def _is_first_process() -> bool:
    """Whether this is the process that speaks for all that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"
