"""One cell of a comparison: one method at one base LR with one seed, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pulseopt_hf.aees.calibration import SHORTEST_RUN
from pulseopt_hf.compare.methods import METHODS
from pulseopt_hf.errors import UsageError

# What an evaluation calls a recipe's metrics, where it is not the metric's name.
METRIC_KEYS = {"matthews": "matthews_correlation", "spearman": "spearmanr", "rouge": "rougeL"}
EVALUATIONS = 5  # in the course of a run, of which the best one is scored beside the last


@dataclass(frozen=True)
class Cell:
    """What to run. `learning_rate` is the base LR, `steps` what a static run would take."""

    recipe: str
    options: tuple[str, ...]
    method: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.method}-{self.learning_rate:.6g}-{self.seed}"


def run_apart(cell: Cell, folder: Path) -> dict[str, Any]:
    """Run a cell in a process of its own, unless its file is there already.

    Returns:
        What the file holds: the cell, `loss_before`, `loss_after` (`None` where it is not finite),
        `metric` (the recipe's first one), `evaluations` (step, loss and metric of each), `steps`,
        `paid_steps` (what the forward passes of a calibration cost), `lr_scale` (what it found),
        `seconds` and `peak_mib`.

    Raises:
        UsageError: the recipe or the method cannot be run.
        RuntimeError: the process died.
    """
    file = folder / f"{cell.name}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found.get("cell") == json.loads(json.dumps(asdict(cell))):
            return found
    import torch

    # A fork spares the imports; CUDA does not survive one.
    start = "spawn" if torch.cuda.is_available() else "fork"
    context: Any = multiprocessing.get_context(start)
    process = context.Process(target=_run, args=(cell, file))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.terminate()
        process.join()
        raise
    if not file.exists():
        raise RuntimeError(f"the run {cell.name} died with exit code {process.exitcode}")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "error" in result:
        file.unlink()
        raise UsageError(*result["error"])
    return result


def _run(cell: Cell, file: Path) -> None:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = nowhere
        try:
            result = _train(cell)
        except UsageError as error:
            result = {"error": list(error.problems)}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result) + "\n", encoding="utf-8")
    part.replace(file)


def _train(cell: Cell) -> dict[str, Any]:
    import torch

    from pulseopt_hf.recipes.lines import Lines, quiet_libraries, without_calibration_log
    from pulseopt_hf.recipes.parsing import resolve
    from pulseopt_hf.recipes.running import make_trainer, prepare

    method = METHODS[cell.method]
    words = [*cell.options, *method.words, "--learning_rate", repr(cell.learning_rate)]
    words += ["--seed", str(cell.seed), "--save_strategy", "no", "--logging_strategy", "no"]
    words += [
        "--report_to",
        "none",
        "--load_best_model_at_end",
        "false",
        "--eval_on_start",
        "false",
    ]
    every = max(1, cell.steps // (method.evaluations or EVALUATIONS))
    evaluating = ["--eval_strategy", "steps", "--eval_steps", str(every)]
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolve(cell.recipe, [*words, *evaluating, "--output_dir", folder])
        training = resolved.training
        batch = training.train_batch_size * training.gradient_accumulation_steps
        training.max_steps = cell.steps
        quiet_libraries(resolved, quiet=True)
        prepared = prepare(resolved)
        trainer: Any = make_trainer(resolved, prepared, Lines(quiet=True, silent=True))
        assert trainer.model is not None
        if method.trainer is not None:
            trainer = method.trainer(trainer)
        if method.optimizer is not None:
            parameters = [p for p in trainer.model.parameters() if p.requires_grad]
            trainer.optimizer = method.optimizer(parameters)
        before = _evaluated(trainer, "")[1]
        if method.calibrates and training.calibration != "off" and cell.learning_rate > 0.0:
            training.max_steps = steps_after_calibration(trainer, cell.steps, batch)
        start = time.perf_counter()
        # Too many skipped steps in a row end a run; what is left of it is not finite either.
        with without_calibration_log(), contextlib.suppress(RuntimeError):
            trainer.train()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
        finished = trainer.state.global_step == training.max_steps
        aees = getattr(trainer, "aees", None)
        calibrator = None if aees is None else aees.calibrator
        outcome = None if calibrator is None else calibrator.outcome
        name = next(iter(resolved.recipe.metrics), "")
        metric = METRIC_KEYS.get(name, name)
        history = [
            _values(entry, metric) for entry in trainer.state.log_history if "eval_loss" in entry
        ]
        if finished:
            history.append(_evaluated(trainer, metric))
        return {
            "cell": asdict(cell),
            "loss_before": before,
            "loss_after": history[-1][1] if finished else None,
            "metric": metric or None,
            "evaluations": history,
            "steps": trainer.state.global_step,
            "paid_steps": cell.steps - training.max_steps,
            "lr_scale": None if outcome is None else outcome.learning_rate / outcome.set_lr,
            "seconds": round(seconds, 3),
            "peak_mib": round(peak, 1),
        }


def steps_after_calibration(trainer: Any, steps: int, batch: int) -> int:
    """Return the optimizer steps that are left when a calibration is paid for, as it is measured.

    A row that goes forward alone costs a third of one that goes forward and backward.

    Args:
        trainer: a Trainer of ours; it is asked, and left as it was.
        steps: what a static run takes.
        batch: rows of an optimizer step.
    """
    if steps < SHORTEST_RUN:
        return steps  # too short to be calibrated
    rows: int = trainer.find_learning_rate().replayed_rows
    return max(SHORTEST_RUN, steps - math.ceil(rows / 3 / batch))


def _evaluated(trainer: Any, metric: str) -> tuple[int, float | None, float | None]:
    return _values({**trainer.evaluate(), "step": trainer.state.global_step}, metric)


def _values(entry: dict[str, Any], metric: str) -> tuple[int, float | None, float | None]:
    """Return the step, the loss and the metric of an evaluation; `None` for what is not finite."""
    loss, value = float(entry["eval_loss"]), float(entry.get(f"eval_{metric}", math.nan))
    return (
        int(entry["step"]),
        loss if math.isfinite(loss) else None,
        value if math.isfinite(value) else None,
    )
