"""Show which LR each half of the trust region allows, on the tasks of `compare_tasks.py`.

    python -m benchmarks.trust_region --data FOLDER [--tasks sst2,...] [--seeds 0,1,2] [--write]

Every task is trained for 50 steps from a base LR of 1e-4, enough for the calibration. The LR that
its trials allow by the outputs alone, by the weights alone, and by both is set beside the LR at
which static runs end best (`benchmarks/results/compare-tasks.json`). `--write` puts the result into
`benchmarks/results/trust-region.json`.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common, compare_tasks
from pulseopt_hf import cli
from pulseopt_hf.aees.calibration import FAINT, OUTPUT_RADIUS, WEIGHT_RADIUS
from pulseopt_hf.compare.summary import markdown
from pulseopt_hf.report.record_reader import read_run

RESULT = common.RESULTS / "trust-region.json"
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
    parser = common.parser(str(__doc__), RESULT)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(compare_tasks.TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=compare_tasks.OUT)
    options = parser.parse_args()
    tuned = common.read(compare_tasks.RESULT)["tasks"]
    result: dict[str, dict[str, float | None]] = {}
    for task in options.tasks.split(","):
        found = [trials(task, options.data, options.out, int(s)) for s in options.seeds.split(",")]
        result[task] = {"tuned": tuned[task]["tuned"]}
        for name, movements in COLUMNS.items():
            rates = [lr for own in found if (lr := allowed(own, *movements)) is not None]
            result[task][name] = statistics.geometric_mean(rates) if rates else None
    common.finish(result, to_markdown, options.write)


def to_markdown(result: dict[str, dict[str, float | None]]) -> str:
    """Return a table with a row for each task."""
    rows = [("task", "tuned", "by outputs", "by weights", "both")]
    for task, row in result.items():
        cells = ("beyond reach" if row[k] is None else f"{row[k]:.1e}" for k in COLUMNS)
        rows.append((task, f"{row['tuned']:g}", *cells))
    return markdown(rows) + "\n"


if __name__ == "__main__":
    main()
