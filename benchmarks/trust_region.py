"""Show which LR each half of the trust region allows, on the tasks of `compare_tasks.py`.

    python benchmarks/trust_region.py --data FOLDER [--tasks sst2,...] [--seeds 0,1,2] [--write]

Every task is trained for 50 steps from a base LR of 1e-4, enough for the calibration. The LR that
its trials allow by the outputs alone, by the weights alone, and by both is set beside the LR at
which static runs end best (`benchmarks/results/compare-tasks.json`). `--write` puts the result into
`benchmarks/results/trust-region.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    from benchmarks import compare_tasks
except ImportError:
    import compare_tasks

from pulseopt_hf import cli
from pulseopt_hf.aees.calibration import FAINT, OUTPUT_RADIUS, WEIGHT_RADIUS
from pulseopt_hf.report.record_reader import read_run

RESULT = Path(__file__).parent / "results" / "trust-region.json"
BASE_LR, STEPS = 1e-4, 50
RADII = {"movement": OUTPUT_RADIUS, "weight_movement": WEIGHT_RADIUS}
COLUMNS = {
    "outputs": ["movement"],
    "weights": ["weight_movement"],
    "both": ["movement", "weight_movement"],
}


def trials(task: str, data: Path, out: Path, seed: int) -> list[dict[str, Any]]:
    """Train, and return the trial steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["train", str(compare_tasks.TASKS_FOLDER / f"{task}.yaml"), "--quiet"]
        words += [*compare_tasks.files(task, data, out), "--output_dir", str(run)]
        words += ["--learning_rate", str(BASE_LR), "--max_steps", str(STEPS), "--seed", str(seed)]
        words += ["--calibration", "trust_region", "--eval_strategy", "no", "--do_eval", "false"]
        if cli.main(words):
            raise SystemExit("The run failed.")
        return [asdict(trial) for trial in read_run(run).trials]


def allowed(found: list[dict[str, Any]], *movements: str) -> float | None:
    """Return the LR that trials on batches of their own allow by these movements."""
    trusted = [
        trial
        for trial in found
        if not trial["own_batch"] and trial["movement"] >= FAINT * OUTPUT_RADIUS
    ]
    if not trusted:
        return None
    return min(
        RADII[name]
        / math.sqrt(
            statistics.fmean((trial[name] / trial["learning_rate"]) ** 2 for trial in trusted)
        )
        for name in movements
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(compare_tasks.TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=compare_tasks.OUT)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    tuned = json.loads(compare_tasks.RESULT.read_text(encoding="utf-8"))["tasks"]
    result = {}
    for task in options.tasks.split(","):
        rows: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for seed in options.seeds.split(","):
            found = trials(task, options.data, options.out, int(seed))
            for name, movements in COLUMNS.items():
                lr = allowed(found, *movements)
                if lr is not None:
                    rows[name].append(lr)
        means = {key: statistics.geometric_mean(v) if v else None for key, v in rows.items()}
        result[task] = {"tuned": tuned[task]["tuned"], **means}
    print(to_markdown(result))
    if options.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def to_markdown(result: dict[str, dict[str, float | None]]) -> str:
    """Return a table with a row for each task."""
    lines = ["| task | tuned | by outputs | by weights | both |", "|---|---|---|---|---|"]
    for task, row in result.items():
        cells = ["beyond reach" if row[k] is None else f"{row[k]:.1e}" for k in COLUMNS]
        lines.append(f"| {task} | {row['tuned']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
