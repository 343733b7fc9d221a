"""What the words of the command ask for: which methods, base LRs and seeds, and for how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pulseopt_hf.command_line import Parser
from pulseopt_hf.compare.cells import Cell
from pulseopt_hf.compare.methods import METHODS
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


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        recipe: its name or file.
        options: keys of the recipe, as words.
        methods: their names, `static` among them.
        learning_rates: base LRs.
        own_lr: the one among them that is the user's.
        seeds: each of them repeats everything.
        steps: optimizer steps of a static run.
        folder: where the results are written.
    """

    recipe: str
    options: tuple[str, ...]
    methods: list[str]
    learning_rates: list[float]
    own_lr: float
    seeds: list[int]
    steps: int
    folder: Path

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
    """Return what the command's words ask for.

    Args:
        words: the recipe and the command's options; those it does not know are the recipe's keys.

    Raises:
        UsageError: an option, the recipe or its data is wrong.
    """
    parser = Parser("compare", takes_recipe=True)
    parser.add_argument(
        "--methods",
        help=f"methods from the list below, separated by commas; by default {SHORT['methods']}",
    )
    parser.add_argument(
        "--learning_rates",
        help="base LRs, separated by commas; by default the recipe's LR times "
        + ", ".join(f"{factor:g}" for factor in FACTORS),
    )
    parser.add_argument("--seeds", help=f"seeds, separated by commas; by default {SHORT['seeds']}")
    parser.add_argument(
        "--steps", type=int, help=f"optimizer steps per run; by default {SHORT['steps']}"
    )
    parser.add_argument(
        "--thorough",
        action="store_true",
        help=f"longer runs, for hours: the methods {THOROUGH['methods']}, half decades of "
        f"base LRs from 1e-5 to 1e-2, the seeds {THOROUGH['seeds']}, and {THOROUGH['steps']} steps",
    )
    parser.add_argument(
        "--out",
        help="folder for the results, by default runs/compare-RECIPE; runs with a result there are "
        "not repeated",
    )
    shown = "".join(f"\n  {name:<15}{method.about}" for name, method in METHODS.items())
    parser.epilog = f"methods:{shown}\n\n{parser.epilog}"
    options, rest = parser.parse_recipe(words)
    catalogue.find(options.recipe)
    for name, value in (THOROUGH if options.thorough else SHORT).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
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
    rates: list[float] = []
    if options.learning_rates is not None:
        rates = _numbers("--learning_rates", options.learning_rates, float, "numbers")
    from pulseopt_hf.recipes.parsing import resolve
    from pulseopt_hf.recipes.running import check

    resolved = resolve(options.recipe, rest)
    check(resolved)
    own_lr = resolved.training.learning_rate
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
