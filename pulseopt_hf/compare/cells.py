"""One cell of a comparison: one method at one base LR with one seed, in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pulseopt_hf.aees.calibration import SHORTEST_RUN
from pulseopt_hf.compare.methods import METHODS
from pulseopt_hf.files import write_whole

# What an evaluation calls a recipe's metrics, where it is not the metric's name.
METRIC_KEYS = {"matthews": "matthews_correlation", "spearman": "spearmanr", "rouge": "rougeL"}
TIMED_STEPS = 10  # after the first one, from which it is told how long a run will take
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


def run_in_subprocess(cell: Cell, folder: Path) -> dict[str, Any]:
    """Run a cell in a subprocess, unless its file is there already, and return what that holds.

    That is the cell, `loss_before`, `loss_after` (`None` where it is not finite), `metric` (the
    recipe's first one), `evaluations` (step, loss and metric of each), `steps`, `paid_steps` (what
    the forward passes of a calibration cost), `lr_scale` (what it found), `seconds` and `peak_mib`.
    """
    found = result_of(cell, folder)
    if found is None:
        content = json.dumps(_in_subprocess(_train, cell))
        write_whole(folder / f"{cell.name}.json", f"{content}\n")
        found = json.loads(content)
    return found


def result_of(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """Return what the file of a cell holds, or `None` where it has not been run."""
    file = folder / f"{cell.name}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found.get("cell") == json.loads(json.dumps(asdict(cell))):
            return found
    return None


def expected_seconds(cell: Cell) -> float:
    """Return about how long a cell will take, from a few static steps and one evaluation."""
    took = _in_subprocess(_time, replace(cell, method="static"))
    evaluations = EVALUATIONS + 2  # before training and after it
    seconds: float = took["set_up"] + evaluations * took["evaluation"] + cell.steps * took["step"]
    return seconds


def _in_subprocess(work: Callable[[Cell], dict[str, Any]], cell: Cell) -> dict[str, Any]:
    import torch

    # A fork spares the imports; CUDA does not survive one.
    start = "spawn" if torch.cuda.is_available() else "fork"
    context = multiprocessing.get_context(start)
    with ProcessPoolExecutor(1, context, initializer=_leave_the_terminal) as pool:
        # While it forks Python drops exceptions, and so a Ctrl-C of that moment. Blocking the
        # signal would not help: another thread would take it.
        interrupts: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
        future = pool.submit(work, cell)
        try:
            signal.signal(signal.SIGINT, before)
            if interrupts:
                raise KeyboardInterrupt
            return future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"the subprocess of the run {cell.name} died") from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _leave_the_terminal() -> None:
    """Print nothing, and leave Ctrl-C, which a terminal sends to both processes, to the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")


@contextlib.contextmanager
def trainer_of(cell: Cell, *words: str) -> Iterator[tuple[Any, str]]:
    """Make the Trainer of a cell, in a folder that goes with it, and name the recipe's metric."""
    from pulseopt_hf.recipes import running
    from pulseopt_hf.recipes.parsing import resolve

    method = METHODS[cell.method]
    own = "--save_strategy no --logging_strategy no --load_best_model_at_end false "
    own += f"--eval_on_start false --learning_rate {cell.learning_rate!r} --seed {cell.seed}"
    options = [*cell.options, *method.words.split(), *own.split(), *words]
    resolved = resolve(cell.recipe, options)
    resolved.training.max_steps = cell.steps
    with running.trainer_of(resolved, quiet=True) as trainer:
        if method.change is not None:
            method.change(trainer)
        name = next(iter(resolved.recipe.metrics), "")
        yield trainer, METRIC_KEYS.get(name, name)


def _time(cell: Cell) -> dict[str, Any]:
    """Return the seconds that setting up, one evaluation and one step take."""
    clock = [time.perf_counter()]
    with trainer_of(cell, "--eval_strategy", "no") as (trainer, _):
        for steps in (1, 1 + TIMED_STEPS):
            trainer.args.max_steps = steps
            trainer.train()
            clock.append(time.perf_counter())
        trainer.evaluate()
        clock.append(time.perf_counter())
    set_up, timed, evaluation = (after - before for before, after in itertools.pairwise(clock))
    return {"set_up": set_up, "evaluation": evaluation, "step": timed / (1 + TIMED_STEPS)}


def _train(cell: Cell) -> dict[str, Any]:
    import torch

    from pulseopt_hf.recipes.lines import without_calibration_log

    method = METHODS[cell.method]
    every = max(1, cell.steps // (method.evaluations or EVALUATIONS))
    evaluating = ("--eval_strategy", "steps", "--eval_steps", str(every))
    with trainer_of(cell, *evaluating) as (trainer, metric):
        training = trainer.args
        batch = training.train_batch_size * training.gradient_accumulation_steps
        before = _values({**trainer.evaluate(), "step": 0}, metric)[1]
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
        steps, log = trainer.state.global_step, trainer.state.log_history
        history = [_values(entry, metric) for entry in log if "eval_loss" in entry]
        finished = steps == training.max_steps
        if finished:
            history.append(_values({**trainer.evaluate(), "step": steps}, metric))
        calibrator = None if trainer.aees is None else trainer.aees.calibrator
        outcome = None if calibrator is None else calibrator.outcome
        return {
            "cell": asdict(cell),
            "loss_before": before,
            "loss_after": history[-1][1] if finished else None,
            "metric": metric or None,
            "evaluations": history,
            "steps": steps,
            "paid_steps": cell.steps - training.max_steps,
            "lr_scale": None if outcome is None else outcome.learning_rate / outcome.set_lr,
            "seconds": round(seconds, 3),
            "peak_mib": round(peak, 1),
        }


def steps_after_calibration(trainer: Any, steps: int, batch: int) -> int:
    """Return how many of a static run's steps are left when a calibration is paid for.

    A row that goes forward alone costs a third of one that goes forward and backward. `batch` is
    the rows of an optimizer step. The Trainer is left as it was.
    """
    if steps < SHORTEST_RUN:
        return steps  # too short to be calibrated
    rows: int = trainer.find_learning_rate().replayed_rows
    return max(SHORTEST_RUN, steps - math.ceil(rows / 3 / batch))


def _values(entry: dict[str, Any], metric: str) -> tuple[int, float | None, float | None]:
    """Return the step, the loss and the metric of an evaluation; `None` for what is not finite."""
    values = (float(entry.get(f"eval_{name}", math.nan)) for name in ("loss", metric))
    loss, value = (value if math.isfinite(value) else None for value in values)
    return int(entry["step"]), loss, value
