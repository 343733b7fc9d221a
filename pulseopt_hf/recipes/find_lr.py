"""The command `pulseopt-hf find-lr`: the learning rate for a recipe, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pulseopt_hf.aees.calibration import (
    NOT_FINITE,
    OUTPUT_RADIUS,
    READABLE,
    SHORTEST_RUN,
    WEIGHT_RADIUS,
    Trial,
)
from pulseopt_hf.command_line import Parser, aligned
from pulseopt_hf.errors import UsageError, needs_extra, usage_error
from pulseopt_hf.recipes import catalogue

if TYPE_CHECKING:
    from pulseopt_hf.optim.suggestion import Suggestion

_ENDINGS = (".svg", ".png")


def find_lr(words: Sequence[str]) -> bool:
    """Print the learning rate of a recipe, and return whether one was found.

    The last line is the number alone: the one that was found, or else the one that is set. Nothing
    is written but the picture that is asked for.
    """
    parser = Parser("find-lr", takes_recipe=True)
    about = "save the picture of the trials, as .svg or .png"
    parser.add_argument("--plot", metavar="FILE", type=Path, help=about)
    options, keys = parser.parse_recipe(words)
    catalogue.find(options.recipe)  # before the slow imports, for a misspelt name
    if options.plot is not None:
        _check_picture(options.plot)
    suggestion, is_first = _ask(options.recipe, keys)
    if not is_first:
        return suggestion.reason is None
    trials = suggestion.trials
    rows = [("trial", "LR", "outputs moved", "weights moved", "one such step")]
    for number, trial in enumerate(trials, 1):
        rows.append((str(number), f"{trial.learning_rate:.2e}", *trial.moved(), _verdict(trial)))
    lines = [*aligned(rows, right=True), ""] if trials else []
    if options.plot is not None and not trials:
        lines.append("No trial was taken, so there is no picture.")
    elif options.plot is not None:
        from pulseopt_hf.report.charts import write_chart

        with usage_error(f"`--plot`: {options.plot} cannot be written", OSError):
            write_chart(suggestion.plot().to_dict(), options.plot)
        lines.append(f"The picture is in {options.plot}.")
    shown = f"{suggestion.learning_rate:.3g}"
    print(*lines, *_advice(suggestion, shown), shown, sep="\n")
    return suggestion.reason is None


def _check_picture(file: Path) -> None:
    """Refuse a picture that could not be saved, before anything is loaded."""
    if file.suffix.lower() not in _ENDINGS:
        raise UsageError(f"`--plot`: {file} must end in {' or '.join(_ENDINGS)}.")
    if file.is_dir():
        raise UsageError(f"`--plot`: {file} is a folder; name a file in it.")
    if not file.parent.is_dir():
        raise UsageError(f"`--plot`: {file.parent}: there is no such folder.")
    with needs_extra("`--plot`", "report"):
        import pulseopt_hf.report.charts  # noqa: F401


def _ask(name: str, keys: list[str]) -> tuple[Suggestion, bool]:
    """Ask the Trainer of a recipe; return what it finds, and whether this is rank 0."""
    from pulseopt_hf.recipes.parsing import resolve
    from pulseopt_hf.recipes.running import trainer_of

    resolved = resolve(name, keys)
    training = resolved.training
    if not training.do_train:
        raise UsageError("`do_train` is off; `find-lr` tries training steps.")
    if training.resume_from_checkpoint is not None:
        raise UsageError("`resume_from_checkpoint`: `find-lr` starts where a new run does.")
    if training.learning_rate <= 0.0:
        raise UsageError("`learning_rate` must be > 0: the search starts from it.")
    with trainer_of(resolved, quiet=False) as trainer, usage_error("`find-lr`", ValueError):
        return trainer.find_learning_rate(), trainer.is_world_process_zero()


def _verdict(trial: Trial) -> str:
    """Say in words how far a trial went."""
    outputs, weights = trial.movement / OUTPUT_RADIUS, trial.weight_movement / WEIGHT_RADIUS
    if trial.movement >= NOT_FINITE:
        return "breaks the model"
    if trial.share > 1.0:
        return f"moves the {'outputs' if outputs >= weights else 'weights'} too far"
    return "is small enough" if trial.share >= READABLE else "hardly moves the model"


def _advice(suggestion: Suggestion, shown: str) -> list[str]:
    """Say what the number is, and what to do with it."""
    if suggestion.reason is not None:
        return [f"No learning rate was found: {suggestion.reason}. This one is set:"]
    times = ""
    if suggestion.factor_for is not None:
        times = (
            f"\nThe learning rate is {suggestion.factor:.2g} times what they allow, for "
            f"{suggestion.factor_for}."
        )
    return [
        "A step may move the outputs, which are what the model computes, at most "
        f"{OUTPUT_RADIUS:g} times as far as",
        f"10% dropout does, and the weights by at most {WEIGHT_RADIUS:.0%}. "
        f"The {suggestion.limited_by} are what limits it.{times}",
        "",
        f"To train with it, set `learning_rate: {shown}` and `calibration: off`. Without these",
        f"lines, a run of at least {SHORTEST_RUN} steps finds its learning rate by itself.",
    ]
