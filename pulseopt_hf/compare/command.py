"""The command: which cells, what is shown meanwhile, and what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pulseopt_hf.command_line import Parser
from pulseopt_hf.compare.cells import Cell, run_apart
from pulseopt_hf.compare.drawing import draw
from pulseopt_hf.compare.methods import METHODS
from pulseopt_hf.compare.scores import Scores, score
from pulseopt_hf.errors import UsageError, nearest
from pulseopt_hf.recipes import catalogue

_Number = TypeVar("_Number", int, float)


def compare(words: Sequence[str]) -> Path:
    """Run what is not there yet of a comparison, and write its table.

    Args:
        words: the recipe and the command's options; those it does not know are the recipe's keys.

    Returns:
        The folder with `compare.json`, `compare.md`, `compare.svg` and a file for each cell.

    Raises:
        UsageError: an option, the recipe or its data is wrong.
    """
    parser = Parser("compare", takes_recipe=True)
    parser.add_argument(
        "--methods",
        default="static,random,published,default",
        help="some of those below, separated by commas; by default %(default)s",
    )
    parser.add_argument(
        "--learning_rates",
        default="1e-5,3e-5,1e-4,3e-4,1e-3,3e-3,1e-2",
        help="base LRs, separated by commas; by default %(default)s",
    )
    parser.add_argument(
        "--seeds", default="0,1,2", help="separated by commas; by default %(default)s"
    )
    parser.add_argument(
        "--steps", type=int, default=600, help="optimizer steps of a run; by default %(default)s"
    )
    parser.add_argument(
        "--out",
        help="folder of the results, by default runs/compare-RECIPE; a run whose result is there "
        "is not repeated",
    )
    shown = "".join(f"\n  {name:<15}{method.about}" for name, method in METHODS.items())
    parser.epilog = f"methods:{shown}\n\n{parser.epilog}"
    options, rest = parser.parse_recipe(words)
    recipe = options.recipe
    catalogue.find(recipe)
    methods = list(dict.fromkeys(name.strip() for name in options.methods.split(",")))
    for name in methods:
        if name not in METHODS:
            raise UsageError(
                f"Unknown method `{name}`{nearest(name, METHODS) or '.'} "
                f"Methods are {', '.join(METHODS)}."
            )
    if "static" not in methods:
        methods.insert(0, "static")  # which everything is measured against
    learning_rates = _numbers("--learning_rates", options.learning_rates, float, "numbers")
    seeds = _numbers("--seeds", options.seeds, int, "whole numbers")
    if options.steps < 1:
        raise UsageError(f"`--steps` must be at least 1, got {options.steps}.")
    from pulseopt_hf.recipes.parsing import resolve
    from pulseopt_hf.recipes.running import check

    check(resolve(recipe, rest))
    folder = Path(options.out or f"runs/compare-{recipe.replace('/', '-')}")
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    cells = [
        Cell(recipe, tuple(rest), method, learning_rate, seed, options.steps)
        for seed in seeds
        for method in methods
        for learning_rate in learning_rates
    ]
    results = []
    for index, cell in enumerate(cells, 1):
        result = _run(cell, learning_rates, folder / "cells")
        results.append(result)
        loss = result["loss_after"]
        shown = "not finite" if loss is None else f"{loss:.4f}"
        print(
            f"{index}/{len(cells)}  {cell.method} at {cell.learning_rate:g}, seed {cell.seed}: "
            f"eval loss {result['loss_before']:.4f} to {shown}, {result['seconds']:.0f} s",
            flush=True,
        )
    try:
        scores = score(results)
    except ValueError as error:
        raise UsageError(str(error)) from error
    content = {"recipe": recipe, "options": rest, "scores": asdict(scores), "cells": results}
    (folder / "compare.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = to_markdown(recipe, options.steps, len(seeds), scores)
    (folder / "compare.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\nWritten to {folder}.")
    if not draw({recipe: (results, scores)}, folder / "compare.svg"):
        print("No plot was drawn: pip install 'pulseopt-hf[report]' has what it needs.")
    return folder


def _run(cell: Cell, learning_rates: list[float], folder: Path) -> dict[str, Any]:
    """Run a cell; a method that ignores the base LR is run at the first one only."""
    if METHODS[cell.method].ignores_lr and cell.learning_rate != learning_rates[0]:
        first = Cell(**{**asdict(cell), "learning_rate": learning_rates[0]})
        result = run_apart(first, folder)
        return {**result, "cell": asdict(cell)}
    return run_apart(cell, folder)


def to_markdown(recipe: str, steps: int, seeds: int, scores: Scores) -> str:
    """Return the table of scores, best robustness first."""
    metric = scores.metric or "metric"
    lines = [
        f"`{recipe}`, {steps} steps, {seeds} seeds. Eval loss {scores.loss_before:.4f} before "
        f"training, {scores.loss_tuned:.4f} at the tuned base LR of {scores.tuned:.2g}"
        + ("." if scores.metric_tuned is None else f", {scores.metric} {scores.metric_tuned:.4f}."),
        "",
        f"| method | robustness | 95 % | worst base LR | harm | at the best evaluation "
        f"| {metric} | at the best evaluation | time | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(scores.scores, key=lambda row: row.robustness):
        lines.append(
            f"| {row.method} | {row.robustness:.3f} | {row.low:.3f} to {row.high:.3f} | "
            f"{row.worst:.3f} | {row.harm:+.3f} | {row.best:.3f} | {_shown(row.metric)} | "
            f"{_shown(row.best_metric)} | {row.seconds:.2f} | {row.peak_mib:.0f} |"
        )
    lines += [
        "",
        "Excess is (L - L\\*) / (L0 - L\\*): 0 is as good as tuned, 1 is nothing learned. "
        "Robustness is its mean over base LRs from 1/30 to 30 times the tuned one, harm its value "
        "at the tuned one. The best evaluation is the one with the lowest loss of each run.",
    ]
    return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _numbers(option: str, text: str, kind: Callable[[str], _Number], name: str) -> list[_Number]:
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or any(not math.isfinite(v) or v < 0 for v in values):
        raise UsageError(f"`{option}` takes {name} >= 0, separated by commas, got {text!r}.")
    return list(dict.fromkeys(values))
