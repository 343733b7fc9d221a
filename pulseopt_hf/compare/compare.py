"""The command: what is asked for, what is said while it runs, and what is written in the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from pulseopt_hf.command_line import Parser, aligned
from pulseopt_hf.compare.cells import Cell, expected_seconds, result_of, run_in_subprocess
from pulseopt_hf.compare.drawing import draw
from pulseopt_hf.compare.methods import METHODS
from pulseopt_hf.compare.scores import score
from pulseopt_hf.compare.summary import about, markdown, scores_table, table, verdict
from pulseopt_hf.errors import UsageError, nearest
from pulseopt_hf.recipes import catalogue
from pulseopt_hf.report.wording import counted

_Number = TypeVar("_Number", int, float)
# The short comparison has the recipe's LR times these. An LR is more often too low than too high,
# and neighbours are close enough for a parabola between them.
FACTORS = (0.25, 1.0, 4.0, 16.0, 64.0)
SHORT = {"methods": "static,default", "seeds": "0", "steps": 200}
THOROUGH = {"methods": "static,random,published,default", "seeds": "0,1,2", "steps": 600}
THOROUGH_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def compare(words: Sequence[str]) -> Path:
    """Run what is not there yet of a comparison, say what came of it, and write it.

    The words are the recipe and the command's options; those it does not know are the recipe's
    keys. A `KeyboardInterrupt` says how the comparison goes on.
    """
    plan = plan_of(words)
    folder = plan.folder
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    results = _run(plan)
    scores = score(results)
    content: dict[str, Any] = {
        "recipe": plan.recipe,
        "options": plan.options,
        "scores": asdict(scores),
        "cells": results,
    }
    (folder / "compare.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    said, rows = verdict(results, scores, plan.own_lr), table(results, scores, plan.own_lr)
    parts = [said, markdown(rows), scores_table(plan.recipe, plan.steps, len(plan.seeds), scores)]
    (folder / "compare.md").write_text("\n".join(f"{part}\n" for part in parts), encoding="utf-8")
    print("", said, "", *aligned(rows), "", sep="\n")
    print(f"In {folder}: compare.md has this and the scores, compare.json every run,")
    if draw({plan.recipe: (results, content["scores"])}, folder / "compare.svg"):
        print("compare.svg the picture.")
    else:
        print("but no picture, which needs pip install 'pulseopt-hf[report]'.")
    return folder


@dataclass(frozen=True)
class Plan:
    """What to run."""

    recipe: str  # its name or file
    options: tuple[str, ...]  # keys of the recipe, as words
    methods: list[str]  # `static` among them
    learning_rates: list[float]
    own_lr: float  # the one among them that is the user's
    seeds: list[int]  # each of them repeats everything
    steps: int  # optimizer steps of a static run
    folder: Path  # of the results

    @property
    def cells(self) -> list[Cell]:
        """Every method at every base LR with every seed."""
        return [
            Cell(self.recipe, self.options, method, learning_rate, seed, self.steps)
            for seed in self.seeds
            for method in self.methods
            for learning_rate in self.learning_rates
        ]

    @property
    def runs(self) -> set[Cell]:
        """Those that are run."""
        return {self.run_of(cell) for cell in self.cells}

    def run_of(self, cell: Cell) -> Cell:
        """Return the cell that is run for one: methods that ignore the base LR run at the first."""
        if METHODS[cell.method].ignores_lr:
            return replace(cell, learning_rate=self.learning_rates[0])
        return cell

    def __str__(self) -> str:
        """Say how many runs it is, and what they will answer."""
        rates = ", ".join(f"{rate:g}" for rate in self.learning_rates)
        others = " or ".join(f"`{name}`" for name in self.methods if name != "static")
        return (
            f"{counted(len(self.runs), 'run')} of {counted(self.steps, 'step')}: "
            f"{', '.join(f'`{name}`' for name in self.methods)} at the learning rates {rates}, "
            f"with {counted(len(self.seeds), 'seed')}.\n"
            "They will show "
            + (f"whether {others} ends lower than `static` at {self.own_lr:g}, " if others else "")
            + "which learning rate a sweep would have found, and what a wrong one costs."
        )


def plan_of(words: Sequence[str]) -> Plan:
    """Return what the command's words ask for; see `compare`."""
    parser = Parser("compare", takes_recipe=True)
    parser.set_defaults(**(THOROUGH if "--thorough" in words else SHORT))
    listed = "separated by commas; by default"
    times = ", ".join(f"{factor:g}" for factor in FACTORS)
    parser.add_argument("--methods", help=f"methods from the list below, {listed} %(default)s")
    about_lrs = f"base LRs, {listed} the recipe's, times {times}"
    parser.add_argument("--learning_rates", help=about_lrs)
    parser.add_argument("--seeds", help=f"seeds, {listed} %(default)s")
    about_steps = "optimizer steps of a run; by default %(default)s"
    parser.add_argument("--steps", type=int, help=about_steps)
    about_thorough = (
        f"takes hours: by default the methods {THOROUGH['methods']}, half decades of base LRs "
        f"from 1e-5 to 1e-2, the seeds {THOROUGH['seeds']}, and {THOROUGH['steps']} steps"
    )
    parser.add_argument("--thorough", action="store_true", help=about_thorough)
    parser.add_argument(
        "--out",
        help="folder for the results, by default runs/compare-RECIPE; runs with a result there are "
        "not repeated",
    )
    shown = "".join(f"\n  {name:<15}{method.about}" for name, method in METHODS.items())
    parser.epilog = f"methods:{shown}\n\n{parser.epilog}"
    options, rest = parser.parse_recipe(words)
    catalogue.find(options.recipe)
    methods = list(dict.fromkeys(name.strip() for name in options.methods.split(",")))
    for name in methods:
        if name not in METHODS:
            raise UsageError(
                f"Unknown method `{name}`{nearest(name, METHODS) or '.'} "
                f"Methods are {', '.join(METHODS)}."
            )
    if "static" not in methods:
        methods.insert(0, "static")  # which everything is measured against
    seeds = _numbers("--seeds", options.seeds, int, "whole numbers")
    if options.steps < 1:
        raise UsageError(f"`--steps` must be at least 1, got {options.steps}.")
    named = options.learning_rates
    rates = [] if named is None else _numbers("--learning_rates", named, float, "numbers")
    from pulseopt_hf.recipes.parsing import resolve

    own_lr = resolve(options.recipe, rest).training.learning_rate
    if not rates and own_lr == 0.0:
        raise UsageError("The recipe's `learning_rate` is 0: name some with `--learning_rates`.")
    if not rates and options.thorough:
        rates = sorted({*THOROUGH_RATES, own_lr})
    folder = Path(options.out or f"runs/compare-{options.recipe.replace('/', '-')}")
    return Plan(
        recipe=options.recipe,
        options=tuple(rest),
        methods=methods,
        learning_rates=rates or [factor * own_lr for factor in FACTORS],
        own_lr=rates[0] if rates and own_lr not in rates else own_lr,
        seeds=seeds,
        steps=options.steps,
        folder=folder,
    )


def _numbers(option: str, text: str, kind: Callable[[str], _Number], name: str) -> list[_Number]:
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or any(not math.isfinite(v) or v < 0 for v in values):
        raise UsageError(f"`{option}` takes {name} >= 0, separated by commas, got {text!r}.")
    return list(dict.fromkeys(values))


def _run(plan: Plan) -> list[dict[str, Any]]:
    """Run the cells that have no result yet, and return the results of all."""
    folder = plan.folder / "cells"
    cells = plan.cells
    missing = {run for run in plan.runs if result_of(run, folder) is None}
    results: list[dict[str, Any]] = []
    print(plan, flush=True)
    # To a file, where a bar would be many lines, it writes none.
    bar = tqdm(
        total=len(missing),
        disable=None,
        leave=False,
        smoothing=0.0,
        bar_format="{bar:30} {n_fmt} of {total_fmt} runs, {remaining} left",
    )
    try:
        if missing:
            seconds = expected_seconds(cells[0]) * len(missing)
            left = "" if missing == plan.runs else f"{counted(len(missing), 'run')} to go. "
            tqdm.write(f"{left}About {about(seconds)}; Ctrl-C stops, and finished runs are kept.")
            bar.unpause()
        for index, cell in enumerate(cells, 1):
            run = plan.run_of(cell)
            result = run_in_subprocess(run, folder)
            results.append({**result, "cell": asdict(cell)})
            bar.update(run in missing)
            missing.discard(run)
            loss = result["loss_after"]
            shown = "not finite" if loss is None else f"{loss:.4f}"
            tqdm.write(
                f"{index}/{len(cells)}  {cell.method} at {cell.learning_rate:g}, seed "
                f"{cell.seed}: eval loss {result['loss_before']:.4f} to {shown}, "
                f"{result['seconds']:.0f} s"
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped with {counted(len(missing), 'run')} to go. Finished runs are kept: the same "
            "command continues from there."
        ) from None
    finally:
        bar.close()
    return results
