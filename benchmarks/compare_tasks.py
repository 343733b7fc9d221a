"""Compares the methods on tasks of different kinds, by `pulseopt-hf compare`.

    python -m benchmarks.compare_tasks --data FOLDER [--tasks sst2,...] [--methods ...]
                                       [--seeds 0,1,2] [--write]

FOLDER holds `glue/sst2`, `text/subj` and `text/mpqa` with a `train.csv` and a `validation.csv` of
the columns `sentence` and `label`, and `wikitext2` with `train.txt` and `validation.txt`. The
MiniLM weights come with the extra [demo]. What was run before is kept in `--out` and not run again,
so tasks may be run one by one; of each, the last comparison counts. `--write` puts all that is
there into `benchmarks/results`, which the tables of the documentation are made from.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import common
from pulseopt_hf.cli import main as pulseopt_hf
from pulseopt_hf.compare.drawing import draw
from pulseopt_hf.compare.methods import METHODS
from pulseopt_hf.compare.scores import counts, excesses, interval
from pulseopt_hf.compare.summary import markdown
from pulseopt_hf.embedded import minilm_folder
from pulseopt_hf.recipes.folder import versions

TASKS_FOLDER = common.ROOT / "benchmarks" / "tasks"
OUT = Path("runs/compare-tasks")
RESULT = common.RESULTS / "compare-tasks.json"
PICTURE = common.ROOT / "docs" / "figures" / "compare.svg"

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
    parser = common.parser(str(__doc__), RESULT)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default="static,default")
    parser.add_argument("--learning_rates", help="instead of each task's own")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", default="600")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for task in options.tasks.split(","):
        code = pulseopt_hf(
            [
                "compare",
                str(TASKS_FOLDER / f"{task}.yaml"),
                *("--methods", options.methods, "--seeds", options.seeds),
                *("--learning_rates", options.learning_rates or TASKS[task][2]),
                *("--steps", options.steps, "--out", str(options.out / task)),
                *files(task, options.data, options.out),
            ]
        )
        if code:
            raise SystemExit(code)
    found = {task: options.out / task / "compare.json" for task in TASKS}
    contents = {task: common.read(file) for task, file in found.items() if file.exists()}
    tasks = {task: summary(own["cells"], own["scores"]) for task, own in contents.items()}
    result = {"versions": packages(), "tasks": tasks}
    common.finish(result, to_markdown, options.write)
    if options.write:
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


def packages() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    return {name: version for name, version in versions().items() if name != "platform"}


def summary(cells: Sequence[dict[str, Any]], scores: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of a task and its cells, with what figures need."""
    kept = ("loss_before", "loss_after", "seconds", "peak_mib", "lr_scale", "paid_steps")
    setting = ("method", "learning_rate", "seed", "steps")
    rows = []
    for cell in cells:
        known = {key: cell[key] for key in kept if key in cell}
        rows.append({**{key: cell["cell"][key] for key in setting}, **known})
    return {**scores, "cells": rows}


def cells_of(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the cells of a task of a result as `pulseopt-hf compare` keeps them."""
    return [{**cell, "cell": cell} for cell in content["cells"]]


def pictured(result: dict[str, Any]) -> dict[str, Any]:
    """Return the cells and scores of every task as `draw` takes them."""
    return {task: (cells_of(content), content) for task, content in result["tasks"].items()}


def to_markdown(result: dict[str, Any]) -> str:
    """Return a table with a row for each task and method, and one for the mean of each."""
    head = ("task", "tuned", "base LRs counted", "method", "seeds", "robustness", "95 %")
    rows = [(*head, "worst", "harm")]
    for task, content in result["tasks"].items():
        tuned, cells = content["tuned"], content["cells"]
        near = sorted({c["learning_rate"] for c in cells if counts(c["learning_rate"], tuned)})
        for row in content["scores"]:
            seeds = len({cell["seed"] for cell in cells if cell["method"] == row["method"]})
            place = (task, f"{tuned:.2g}", f"{near[0]:g} to {near[-1]:g}", row["method"])
            rows.append((*place, str(seeds), *_shown(row)))
    for method, row in overall(result).items():
        rows.append(("**mean**", "", "", method, "", *_shown(row)))
    return markdown(rows) + "\n"


def _shown(row: Mapping[str, float]) -> tuple[str, ...]:
    ends = f"{row['low']:.3f} to {row['high']:.3f}"
    return f"{row['robustness']:.3f}", ends, f"{row['worst']:.3f}", f"{row['harm']:+.3f}"


def overall(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the mean over tasks of every method that was run on all, and the worst of all."""
    tasks = result["tasks"].values()
    rows = [{row["method"]: row for row in content["scores"]} for content in tasks]
    means = {}
    for method in [name for name in METHODS if all(name in of_task for of_task in rows)]:
        own = [of_task[method] for of_task in rows]
        seeds = [excesses(cells_of(content), method, "seed", content) for content in tasks]
        low, high = interval([[fmean(own) for own in by_seed.values()] for by_seed in seeds])
        means[method] = {
            "robustness": fmean(row["robustness"] for row in own),
            **{"low": low, "high": high},
            "worst": max(row["worst"] for row in own),
            "harm": fmean(row["harm"] for row in own),
        }
    return means


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
