"""Take parts of the calibration away and see what the final loss says.

    python -m benchmarks.ablation --data FOLDER [--tasks sst2,...] [--variants ...]
                                  [--seeds 0,1,2] [--write]

Every variant trains the tasks of `compare_tasks.py` from the lowest of their base LRs, with the
same budget. The excess is measured against the tuned static run of
`benchmarks/results/compare-tasks.json`, which the first row is taken from too. Runs are kept in
`--out` and not run again. `--write` puts the result into `benchmarks/results/ablation.json`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import common, compare_tasks
from pulseopt_hf.aees import calibration
from pulseopt_hf.compare.cells import Cell, run_in_subprocess
from pulseopt_hf.compare.scores import excess
from pulseopt_hf.compare.summary import markdown

RESULT = common.RESULTS / "ablation.json"
OUT = Path("runs/ablation")
TASKS = "sentences,six_classes,digits"
SHIPPED = "as shipped"


@dataclass(frozen=True)
class Variant:
    """What differs from the shipped default.

    Attributes:
        label: what it is called in the table.
        constants: of the calibration, by name.
        options: keys of the recipe.
        tasks: where it is tried; elsewhere it changes nothing, or costs more than it tells.
    """

    label: str
    constants: dict[str, float] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("sst2", "wikitext2", "sentences", "six_classes", "digits")


_COLD = ("--warmup_steps", "0")
_ARMS = ("--lr_candidates", "0.5", "1.0", "2.0")
_FROM_SCRATCH = ("wikitext2", "sentences", "digits")
VARIANTS = {
    "outputs": Variant(
        "trust region of the outputs only", {"WEIGHT_RADIUS": math.inf}, tasks=_FROM_SCRATCH
    ),
    "full_trials": Variant(
        "trials that go as far as a step may", {"TRIAL_SHARE": 1.0}, tasks=_FROM_SCRATCH
    ),
    "one_trial": Variant("one batch near the edge instead of five", {"TRUSTED": 1}),
    "cold": Variant("no warm-up", options=_COLD),
    "arms": Variant("arms of 0.5, 1 and 2", options=_ARMS),
    "random": Variant("the same arms at random", options=(*_ARMS, "--control_mode", "random")),
}


def losses(
    variant: Variant, task: str, seeds: list[int], steps: int, data: Path, out: Path
) -> list[float | None]:
    """Train with every seed, and return the final losses; `None` where one is not finite."""
    words = (*compare_tasks.files(task, data, compare_tasks.OUT), *variant.options)
    recipe = str(compare_tasks.TASKS_FOLDER / f"{task}.yaml")
    out.mkdir(parents=True, exist_ok=True)
    found: list[float | None] = []
    for seed in seeds:
        cell = Cell(recipe, words, "default", lowest_lr(task), seed, steps)
        with ExitStack() as stack:
            # A cell is run in a fork of this process, which finds the constants as they are here.
            for name, value in variant.constants.items():
                stack.enter_context(patch.object(calibration, name, value))
            loss = run_in_subprocess(cell, out)["loss_after"]
        print(f"{variant.label}, {task}, seed {seed}: {loss}", flush=True)
        found.append(loss)
    return found


def lowest_lr(task: str) -> float:
    """Return the base LR that the variants of a task begin from."""
    return float(compare_tasks.TASKS[task][2].split(",")[0])


def shipped(content: dict[str, Any], task: str, seeds: list[int]) -> list[float | None]:
    """Return the final losses of the default in the comparison's result."""
    rows = {
        cell["seed"]: cell["loss_after"]
        for cell in content["cells"]
        if (cell["method"], cell["learning_rate"]) == ("default", lowest_lr(task))
    }
    return [rows[seed] for seed in seeds]


def main() -> None:
    parser = common.parser(str(__doc__), RESULT)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if torch.cuda.is_available():
        # Cells are spawned there, and would find the constants as they are shipped.
        raise SystemExit("Hide the GPU: CUDA_VISIBLE_DEVICES= python -m benchmarks.ablation ...")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    compared = common.read(compare_tasks.RESULT)["tasks"]
    result: dict[str, dict[str, list[float]]] = {}
    for task in options.tasks.split(","):
        content = compared[task]
        rows = {SHIPPED: shipped(content, task, seeds)}
        for name in options.variants.split(","):
            variant, out = VARIANTS[name], options.out / name / task
            if task in variant.tasks:
                rows[variant.label] = losses(variant, task, seeds, options.steps, options.data, out)
        ends = content["loss_before"], content["loss_tuned"]
        result[task] = {label: [excess(loss, *ends) for loss in own] for label, own in rows.items()}
    common.finish(result, to_markdown, options.write)


def to_markdown(result: dict[str, dict[str, list[float]]]) -> str:
    """Return a table of the excess, mean and range over seeds, with a row for each variant."""
    labels = dict.fromkeys(label for rows in result.values() for label in rows)
    rows = [(label, *(_shown(own.get(label, [])) for own in result.values())) for label in labels]
    return markdown([("variant", *result), *rows]) + "\n"


def _shown(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
