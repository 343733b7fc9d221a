"""Compares the methods on tasks of different kinds, by `pulseopt-hf compare`.

python benchmarks/compare_tasks.py --data FOLDER [--tasks sst2,...] [--methods ...] [--seeds 0,1,2]

FOLDER holds `glue/sst2`, `text/subj` and `text/mpqa` with a `train.csv` and a `validation.csv` of
the columns `sentence` and `label`, and `wikitext2` with `train.txt` and `validation.txt`. The
MiniLM weights come with the extra [demo]. What was run before is kept and not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pulseopt_hf.cli import main as pulseopt_hf
from pulseopt_hf.embedded import minilm_folder

TASKS_FOLDER = Path(__file__).parent / "tasks"
OUT = Path("runs/compare-tasks")
RESULTS = Path(__file__).parent / "results" / "compare-tasks.json"

# Where a task's data lies, the layers of MiniLM that it trains, and base LRs half a decade apart
# that hold thirty times more and less than the tuned one.
TASKS = {
    "sst2": ("glue/sst2/{}.csv", 2, "1e-5,1e-4,3e-4,1e-3,1e-2"),
    "subj": ("text/subj/{}.csv", 2, "1e-5,1e-4,3e-4,1e-3,1e-2"),
    "mpqa": ("text/mpqa/{}.csv", 2, "1e-5,1e-4,3e-4,1e-3,1e-2"),
    "sst2_lora": ("glue/sst2/{}.csv", 4, "1e-4,1e-3,3e-3,1e-2,1e-1"),
    "wikitext2": ("wikitext2/{}.txt", 0, "3e-4,1e-3,3e-3,1e-2,3e-2,1e-1"),
    "sentences": (None, 0, "3e-4,1e-3,3e-3,1e-2,3e-2,1e-1"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default="static,default")
    parser.add_argument("--learning_rates", help="instead of each task's own")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", default="600")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for task in options.tasks.split(","):
        files, layers, learning_rates = TASKS[task]
        words = []
        if files is not None:
            words += ["--train_file", str(options.data / files.format("train"))]
            words += ["--validation_file", str(options.data / files.format("validation"))]
        if layers:
            words += ["--model_name_or_path", str(first_layers(layers, options.out))]
        code = pulseopt_hf(
            [
                "compare",
                str(TASKS_FOLDER / f"{task}.yaml"),
                *("--methods", options.methods, "--seeds", options.seeds),
                *("--learning_rates", options.learning_rates or learning_rates),
                *("--steps", options.steps, "--out", str(options.out / task)),
                *words,
            ]
        )
        if code:
            raise SystemExit(code)
    summarise(options.out)


def summarise(folder: Path) -> None:
    """Write the scores and losses of every task that was run into `benchmarks/results`."""
    result = {}
    for file in sorted(folder.glob("*/compare.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        cells = [
            {
                **{key: cell["cell"][key] for key in ("method", "learning_rate", "seed", "steps")},
                **{key: cell[key] for key in ("loss_before", "loss_after", "seconds")},
            }
            for cell in content["cells"]
        ]
        result[file.parent.name] = {**content["scores"], "cells": cells}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


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
