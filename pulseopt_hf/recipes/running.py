"""A resolved recipe to a finished run."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, ProgressCallback, set_seed

from pulseopt_hf import PulseOptSeq2SeqTrainer, PulseOptTrainer
from pulseopt_hf.errors import UsageError
from pulseopt_hf.progress import EpisodeLines
from pulseopt_hf.recipes import folder, models, splits, tasks
from pulseopt_hf.recipes.interruption import Interruption
from pulseopt_hf.recipes.lines import (
    Bar,
    EpochLines,
    Lines,
    quiet_libraries,
    without_calibration_log,
)
from pulseopt_hf.recipes.model_card import write_card
from pulseopt_hf.recipes.parsing import Resolved
from pulseopt_hf.recipes.problems import Problems
from pulseopt_hf.report.wording import described
from pulseopt_hf.trainer.card import section


class Interrupted(Exception):
    """A signal ended the run, with a checkpoint; the message says how to continue."""


@dataclass
class RunOptions:
    """What a command says about a run beyond the recipe.

    Attributes:
        resume: continue from the last whole checkpoint.
        overwrite: replace the run in the run folder.
        quiet: write nothing to the screen.
        command: the words of the command line, for the record.
    """

    resume: bool = False
    overwrite: bool = False
    quiet: bool = False
    command: tuple[str, ...] = ()


def check(resolved: Resolved) -> None:
    """Check what needs neither the hub, nor rows, nor weights.

    Raises:
        UsageError: with a line for each problem.
    """
    problems = Problems()
    with problems:
        splits.check(resolved.recipe, resolved.training)
    with problems:
        models.check(resolved.recipe)
    problems.raise_any()


def prepare(resolved: Resolved) -> tasks.Prepared:
    """Load the data, the tokenizer and the model of a recipe, with the random state of its seed.

    Raises:
        UsageError: one of these is wrong.
    """
    recipe, training = resolved.recipe, resolved.training
    set_seed(training.seed)
    with training.main_process_first(desc="data"):
        return tasks.prepare(recipe, training, splits.load(recipe, training))


def make_trainer(resolved: Resolved, prepared: tasks.Prepared, write: Lines) -> PulseOptTrainer:
    """Build the Trainer of a recipe, with callbacks that report its progress."""
    cls: Any = PulseOptSeq2SeqTrainer if resolved.recipe.task == "seq2seq" else PulseOptTrainer
    trainer: PulseOptTrainer = cls(
        prepared.model,
        resolved.training,
        data_collator=prepared.task.collator(prepared.model),
        train_dataset=prepared.train,
        eval_dataset=prepared.validation[0] if prepared.validation else None,
        processing_class=prepared.task.processing_class,
        compute_metrics=prepared.task.compute_metrics,
        preprocess_logits_for_metrics=prepared.task.preprocess_logits,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not resolved.training.disable_tqdm:
        trainer.add_callback(Bar())
    trainer.add_callback(EpisodeLines(trainer, write))
    trainer.add_callback(EpochLines(write))
    return trainer


def run(resolved: Resolved, options: RunOptions) -> dict[str, Any]:
    """Train, evaluate and predict as a recipe says, and write the run folder.

    Nothing is written before recipe, data, tokenizer and model have been checked.

    Returns:
        The content of `all_results.json`.

    Raises:
        UsageError: one of these is wrong.
        Interrupted: Ctrl-C or SIGTERM.
    """
    training = resolved.training
    write = Lines(quiet=options.quiet, silent=training.process_index != 0)
    quiet_libraries(resolved, quiet=options.quiet)
    path, checkpoint = _choose_folder(resolved, options, write)
    training.output_dir = str(path)
    prepared = prepare(resolved)
    _check_episode_length(resolved, prepared)
    if training.process_index == 0:
        if options.overwrite:
            folder.clear(path)
        path.mkdir(parents=True, exist_ok=True)
        folder.write_recipe(path, resolved)
        folder.write_run(path, resolved, options.command, checkpoint)
        write.file = path / folder.LOG
    trainer = make_trainer(resolved, prepared, write)
    if training.do_train:
        _train(trainer, resolved, options, checkpoint, write)
    if training.do_eval:
        _evaluate(trainer, resolved, prepared, write)
    if training.do_predict:
        _predict(trainer, resolved, prepared)
    results: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        file = path / "all_results.json"
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        write_card(path, resolved, results, section(trainer))
    write(f"The run is in {path}: {folder.RECIPE} repeats it, README.md summarises it,")
    write("episodes.json holds every trial and episode, all_results.json the scores.")
    return results


def _choose_folder(
    resolved: Resolved, options: RunOptions, write: Lines
) -> tuple[Path, Path | None]:
    """Choose the run folder and the checkpoint on rank 0, before anything is written there."""
    chosen: list[Any] = [None]
    if resolved.training.process_index == 0:
        try:
            path = folder.choose(resolved, resume=options.resume, overwrite=options.overwrite)
            chosen = [(path, *folder.checkpoint_of(path, resolved, resume=options.resume))]
        except UsageError as error:
            chosen = [error]
    if resolved.training.world_size > 1:
        broadcast_object_list(chosen)
    if isinstance(chosen[0], UsageError):
        raise chosen[0]
    path, checkpoint, passed_over = chosen[0]
    for line in passed_over:
        write(line)
    if checkpoint is not None:
        write(f"going on from {checkpoint}")
    return path, checkpoint


def _check_episode_length(resolved: Resolved, prepared: tasks.Prepared) -> None:
    """Refuse an episode that is longer than the run before anything is written."""
    training = resolved.training
    length, steps = training.episode_length, training.max_steps
    if not training.do_train or length is None or prepared.train is None:
        return
    if steps < 0:
        batch = training.train_batch_size * training.world_size
        batches = math.ceil(len(prepared.train) / batch)
        per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
        steps = math.ceil(per_epoch * training.num_train_epochs)
    if length > steps:
        raise UsageError(
            f"`episode_length` must be at most the {steps} optimizer steps of this run, got "
            f"{length}; leave it out to derive it from the run."
        )


def _train(
    trainer: PulseOptTrainer,
    resolved: Resolved,
    options: RunOptions,
    checkpoint: Path | None,
    write: Lines,
) -> None:
    path = Path(str(resolved.training.output_dir))
    with without_calibration_log(), Interruption(trainer, write) as interruption:
        trainer.add_callback(interruption)
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.remove_callback(interruption)
    if interruption.happened:
        step = trainer.state.global_step
        raise Interrupted(
            f"Stopped at step {step} of {trainer.state.max_steps}; checkpoint-{step} is saved. "
            f"Continue with:\n{folder.command_to_go_on(path, resolved, options.command)}"
        )
    train_data: Any = trainer.train_dataset
    trainer.save_model()
    trainer.save_metrics("train", {**result.metrics, "train_samples": len(train_data)})
    trainer.save_state()
    assert trainer.aees is not None
    logs = trainer.aees.get_logs()
    if trainer.is_world_process_zero():
        (path / "episodes.json").write_text(json.dumps(logs, indent=1) + "\n", encoding="utf-8")
    if trainer.aees.config.arms > 1:
        plays = sorted(Counter(logs["selected_lr_values"]).items())
        write("plays of each LR multiplier: " + ", ".join(f"x{k:g} {n}" for k, n in plays))


def _evaluate(
    trainer: PulseOptTrainer, resolved: Resolved, prepared: tasks.Prepared, write: Lines
) -> None:
    metrics: dict[str, Any] = {}
    trainer.remove_callback(EpochLines)  # the line below says it
    for index, rows in enumerate(prepared.validation):
        values = {**trainer.evaluate(rows), "eval_samples": len(rows)}
        suffix = resolved.recipe.suffix(index)
        metrics |= {f"{key}{suffix}": value for key, value in values.items()}
    trainer.save_metrics("eval", metrics)
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if history and history[0]["step"] == 0 and resolved.training.do_train:
        write(f"eval loss before training: {history[0]['eval_loss']:.3f}")
        write(f"eval loss after training:  {metrics['eval_loss']:.3f}")
    write(described(metrics))


def _predict(trainer: PulseOptTrainer, resolved: Resolved, prepared: tasks.Prepared) -> None:
    """Write predictions as GLUE wants submissions: tab-separated `index` and `prediction`."""
    to_lines = prepared.task.to_lines
    assert to_lines is not None  # tasks that predict nothing refuse `do_predict`
    trainer.compute_metrics = None  # GLUE's test sets have no true labels
    names = resolved.recipe.prediction_files
    for index, rows in enumerate(prepared.test):
        name = names[index] if index < len(names) else f"predictions{index or ''}.tsv"
        lines = to_lines(trainer.predict(rows, metric_key_prefix="predict").predictions)
        if trainer.is_world_process_zero():
            content = ["index\tprediction", *(f"{row}\t{line}" for row, line in enumerate(lines))]
            file = Path(str(resolved.training.output_dir)) / name
            file.write_text("\n".join(content) + "\n", encoding="utf-8")
