"""A resolved recipe to a finished run."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, ProgressCallback, set_seed

from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.record_format import FILE_NAME
from pulseopt_hf.errors import UsageError, usage_error
from pulseopt_hf.recipes import folder, models, splits, tasks
from pulseopt_hf.recipes.interruption import Interruption
from pulseopt_hf.recipes.lines import Bar, Lines, RunLines, quiet_libraries, without_calibration_log
from pulseopt_hf.recipes.model_card import write_card
from pulseopt_hf.recipes.parsing import Resolved
from pulseopt_hf.report.wording import described
from pulseopt_hf.trainer.card import section


def prepare(resolved: Resolved) -> tasks.Task:
    """Load the data, the tokenizer and the model of a recipe, with the random state of its seed."""
    recipe, training = resolved.recipe, resolved.training
    set_seed(training.seed)
    with training.main_process_first(desc="data"):
        task = tasks.prepare(recipe, training, splits.load(recipe, training))
    if task.model is None:
        # By all ranks at once: under ZeRO-3 they divide its weights as it is made.
        task.model = models.load_model(recipe, task.config)
    return task


def make_trainer(
    resolved: Resolved, task: tasks.Task, write: Lines | None = None, *, outcomes: bool = True
) -> PulseOptTrainer:
    """Build the Trainer of a recipe, which reports its progress if it can `write`.

    `outcomes` says whether it reports what came of a calibration too.
    """
    with usage_error(f"`task: {resolved.recipe.task}`", ValueError):
        trainer = task.make_trainer(resolved.training)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not resolved.training.disable_tqdm:
        trainer.add_callback(Bar())
    if write is not None:
        trainer.add_callback(RunLines(trainer, write, outcomes=outcomes))
    return trainer


@contextmanager
def trainer_of(resolved: Resolved, *, quiet: bool) -> Iterator[PulseOptTrainer]:
    """Build a Trainer that leaves nothing behind: its folder goes with it, no tracker hears of it.

    `quiet` shows no progress bar.
    """
    quiet_libraries(resolved, quiet=quiet)
    resolved.training.report_to, resolved.training.push_to_hub = [], False
    with tempfile.TemporaryDirectory() as temporary:
        resolved.training.output_dir = temporary  # Trainer makes it
        yield make_trainer(resolved, prepare(resolved))


def run(
    resolved: Resolved,
    command: Sequence[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    conclude: bool = True,
) -> str | None:
    """Train, evaluate and predict as a recipe says, and write the run folder.

    Nothing is written before recipe, data, tokenizer and model have been checked. The record gets
    `command`. The last lines say what came of the run and where it is, unless the caller does so
    and turns `conclude` off. If Ctrl-C or SIGTERM ended the run, returns how to continue it from
    its checkpoint.
    """
    training = resolved.training
    write = Lines(quiet=quiet or training.process_index != 0)
    quiet_libraries(resolved, quiet=quiet)
    chosen: list[Any] = [None]
    if training.process_index == 0:
        try:
            chosen = [folder.choose(resolved, resume=resume, overwrite=overwrite)]
        except UsageError as error:
            chosen = [error]
    broadcast_object_list(chosen)
    if isinstance(chosen[0], UsageError):
        raise chosen[0]
    path, checkpoint, passed_over = chosen[0]
    for line in passed_over:
        write(line)
    if checkpoint is not None:
        write(f"resuming from {checkpoint}")
    training.output_dir = str(path)
    task = prepare(resolved)
    _check_episode_length(resolved, task)
    trainer = make_trainer(resolved, task, write, outcomes=conclude)
    if training.process_index == 0:
        if overwrite:
            folder.clear(path)
        folder.write_start(path, resolved, command, checkpoint)
        write.file = path / folder.LOG
    if training.do_train and not _train(trainer, checkpoint, write):
        step = trainer.state.global_step
        return (
            f"Stopped at step {step} of {trainer.state.max_steps}; checkpoint-{step} is saved. "
            f"Continue with:\n{folder.resume_command(path, resolved, command)}"
        )
    scores = _evaluate(trainer, resolved, task) if training.do_eval else {}
    if training.do_predict:
        _predict(trainer, resolved, task)
    if trainer.is_world_process_zero():
        file = path / "all_results.json"
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        write_card(path, resolved, results, section(trainer))
    if conclude:
        for line in _conclusion(trainer, scores, path):
            write(line)
    return None


def _check_episode_length(resolved: Resolved, task: tasks.Task) -> None:
    """Refuse an episode that is longer than the run before anything is written."""
    training = resolved.training
    steps = training.max_steps
    if not training.do_train or resolved.recipe.task == "grpo":
        return  # `grpo` takes several completions of each row
    if steps < 0:
        batch = training.train_batch_size * training.world_size
        batches = math.ceil(len(task.sets["train"][0]) / batch)
        per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
        steps = math.ceil(per_epoch * training.num_train_epochs)
    try:
        PulseOptConfig.of_knobs(training).for_run(steps, training.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _train(trainer: PulseOptTrainer, checkpoint: Path | None, write: Lines) -> bool:
    """Train and save the model; return whether training went to its end."""
    with without_calibration_log(), Interruption(trainer, write) as interruption:
        trainer.add_callback(interruption)
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.remove_callback(interruption)
    if interruption.happened:
        return False
    data: Any = trainer.train_dataset
    trainer.save_model()
    trainer.save_metrics("train", {**result.metrics, "train_samples": len(data)})
    trainer.save_state()
    return True


def _evaluate(trainer: PulseOptTrainer, resolved: Resolved, task: tasks.Task) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    trainer.remove_callback(RunLines)  # the conclusion says it
    for index, rows in enumerate(task.sets["validation"]):
        values = {**trainer.evaluate(rows), "eval_samples": len(rows)}
        suffix = resolved.recipe.suffix(index)
        metrics |= {f"{key}{suffix}": value for key, value in values.items()}
    trainer.save_metrics("eval", metrics)
    return metrics


def _conclusion(trainer: PulseOptTrainer, scores: Mapping[str, Any], path: Path) -> Iterator[str]:
    if trainer.aees is not None and trainer.aees.config.arms > 1:
        plays = Counter[float]()
        for arm in trainer.aees.controller.totals():
            plays[arm.lr_multiplier] += arm.plays
        yield "plays of each LR multiplier: " + ", ".join(f"x{k:g} {n}" for k, n in plays.items())
    if scores:
        yield described(scores)
    yield f"The run is in {path}: {folder.RECIPE} runs it again, README.md sums it up,"
    record = f"{FILE_NAME} holds every trial and episode, " if (path / FILE_NAME).exists() else ""
    yield f"{record}all_results.json the scores."


def _predict(trainer: PulseOptTrainer, resolved: Resolved, task: tasks.Task) -> None:
    """Write predictions as GLUE wants submissions: tab-separated `index` and `prediction`."""
    to_lines = task.to_lines
    assert to_lines is not None  # tasks that predict nothing refuse `do_predict`
    trainer.compute_metrics = None  # GLUE's test sets have no true labels
    names = resolved.recipe.prediction_files
    for index, rows in enumerate(task.sets["test"]):
        name = names[index] if index < len(names) else f"predictions{index or ''}.tsv"
        lines = to_lines(trainer.predict(rows, metric_key_prefix="predict").predictions)
        if trainer.is_world_process_zero():
            content = ["index\tprediction", *(f"{row}\t{line}" for row, line in enumerate(lines))]
            file = Path(str(resolved.training.output_dir)) / name
            file.write_text("\n".join(content) + "\n", encoding="utf-8")
