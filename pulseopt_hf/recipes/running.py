"""A resolved recipe to a finished run."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, ProgressCallback, set_seed

from pulseopt_hf import PulseOptSeq2SeqTrainer, PulseOptTrainer
from pulseopt_hf.errors import UsageError
from pulseopt_hf.progress import EpisodeLines
from pulseopt_hf.recipes import data, folder, models, tasks
from pulseopt_hf.recipes.card import write_card
from pulseopt_hf.recipes.lines import Bar, EpochLines, Interruption, Lines
from pulseopt_hf.recipes.parsing import Resolved
from pulseopt_hf.report.wording import described
from pulseopt_hf.trainer.card import section
from pulseopt_hf.trainer.checkpoints import newest_whole_checkpoint


class Interrupted(Exception):
    """The run was ended by a signal, with a checkpoint; the message says how to go on."""


@dataclass
class RunOptions:
    """What a command says of a run beyond the recipe.

    Attributes:
        resume: go on from the last whole checkpoint.
        overwrite: replace the run in the run folder.
        quiet: write nothing to the screen.
        command: the words of the command line, for the record.
    """

    resume: bool = False
    overwrite: bool = False
    quiet: bool = False
    command: tuple[str, ...] = ()


def run(resolved: Resolved, options: RunOptions) -> dict[str, Any]:
    """Train, evaluate and predict as a recipe says, and write the run folder.

    Nothing is written before recipe, data, tokenizer and model have been found right.

    Returns:
        What `all_results.json` holds.

    Raises:
        UsageError: something of these is wrong.
        Interrupted: Ctrl-C or SIGTERM.
    """
    training = resolved.training
    write = Lines(quiet=options.quiet, silent=training.process_index != 0)
    calm(resolved, options)
    path, checkpoint = _choose_folder(resolved, options, write)
    training.output_dir = str(path)
    prepared = prepare(resolved)
    _check_episode_length(resolved, prepared)
    if training.process_index == 0:
        if options.overwrite:
            folder.clear(path)
        path.mkdir(parents=True, exist_ok=True)
        folder.write_recipe(path, resolved)
        folder.write_run(path, resolved, list(options.command), checkpoint)
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
    write(f"The run is in {path}: {folder.RECIPE} runs it again, README.md sums it up,")
    write("episodes.json holds every trial and episode, all_results.json the scores.")
    return results


def prepare(resolved: Resolved) -> tasks.Prepared:
    """Load the data, the tokenizer and the model of a recipe, with the random state of its seed.

    Raises:
        UsageError: something of these is wrong.
    """
    training = resolved.training
    set_seed(training.seed)
    with training.main_process_first(desc="data"):
        parts = data.load(resolved.recipe, training)
        return tasks.prepare(resolved.recipe, training, parts)


def check(resolved: Resolved) -> None:
    """Check what needs neither the hub, nor rows, nor weights.

    Raises:
        UsageError: something is wrong; it has a line for each.
    """
    problems: list[str] = []
    for part in (
        partial(data.check, resolved.recipe, resolved.training),
        partial(models.check, resolved.recipe),
    ):
        try:
            part()
        except UsageError as error:
            problems += error.problems
    if problems:
        raise UsageError(*problems)


@contextmanager
def told_by_lines() -> Iterator[None]:
    """Keep the outcome of a calibration out of the log, where the run's own lines tell of it."""
    logger = logging.getLogger("pulseopt_hf.calibration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def calm(resolved: Resolved, options: RunOptions) -> None:
    """Leave the screen to the run's own lines."""
    training = resolved.training
    if "log_level" not in resolved.given:
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if "disable_tqdm" not in resolved.given:
        # In a file a bar is thousands of lines.
        training.disable_tqdm = options.quiet or not sys.stderr.isatty()
    if training.disable_tqdm:
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        datasets.disable_progress_bars()


def _choose_folder(
    resolved: Resolved, options: RunOptions, write: Lines
) -> tuple[Path, Path | None]:
    """Choose the run folder and the checkpoint on rank 0, before anything is written there."""
    chosen: list[Any] = [None, None, [], None]
    if resolved.training.process_index == 0:
        try:
            path = folder.choose(resolved, resume=options.resume, overwrite=options.overwrite)
            chosen[0] = path
            if options.resume:
                chosen[1:3] = newest_whole_checkpoint(path)
                if chosen[1] is None:
                    why = f" ({'; '.join(chosen[2])})" if chosen[2] else ""
                    raise UsageError(
                        f"`--resume`: there is no whole checkpoint in {path}{why}. Leave it out "
                        "to start a new run."
                    )
                folder.refuse_unsaid_changes(path, resolved)
            elif resolved.training.resume_from_checkpoint is not None:
                chosen[1] = _named_checkpoint(resolved.training.resume_from_checkpoint)
        except UsageError as error:
            chosen[3] = error
    if resolved.training.world_size > 1:
        broadcast_object_list(chosen)
    path, checkpoint, passed_over, problem = chosen
    if problem is not None:
        raise problem
    for line in passed_over:
        write(line)
    if checkpoint is not None:
        write(f"going on from {checkpoint}")
    return path, checkpoint


def _named_checkpoint(name: str) -> Path:
    path = Path(name)
    if not (path / "trainer_state.json").is_file():
        raise UsageError(f"`resume_from_checkpoint`: {name} is not a checkpoint.")
    return path


def _check_episode_length(resolved: Resolved, prepared: tasks.Prepared) -> None:
    """Find an episode that is longer than the run before anything is written."""
    training = resolved.training
    length = training.episode_length
    if not training.do_train or length is None or prepared.train is None:
        return
    steps = training.max_steps
    if steps < 0:
        batch = training.train_batch_size * training.world_size
        per_epoch = math.ceil(len(prepared.train) / batch)
        per_epoch = max(1, math.ceil(per_epoch / training.gradient_accumulation_steps))
        steps = math.ceil(per_epoch * training.num_train_epochs)
    if length > steps:
        raise UsageError(
            f"`episode_length` must be at most the {steps} optimizer steps of this run, got "
            f"{length}; leave it out to have it follow from the run."
        )


def make_trainer(resolved: Resolved, prepared: tasks.Prepared, write: Lines) -> PulseOptTrainer:
    """Build the Trainer of a recipe, with the callbacks that say how it gets on."""
    cls: Any = PulseOptSeq2SeqTrainer if resolved.recipe.task == "seq2seq" else PulseOptTrainer
    trainer: PulseOptTrainer = cls(
        prepared.model,
        resolved.training,
        data_collator=prepared.collator,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation[0] if prepared.validation else None,
        processing_class=prepared.processing_class,
        compute_metrics=prepared.compute_metrics,
        preprocess_logits_for_metrics=prepared.preprocess_logits,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not resolved.training.disable_tqdm:
        trainer.add_callback(Bar())
    trainer.add_callback(EpisodeLines(trainer, write))
    trainer.add_callback(EpochLines(write))
    return trainer


def _train(
    trainer: PulseOptTrainer,
    resolved: Resolved,
    options: RunOptions,
    checkpoint: Path | None,
    write: Lines,
) -> None:
    path = Path(str(resolved.training.output_dir))
    with told_by_lines(), Interruption(trainer, write) as interruption:
        trainer.add_callback(interruption)
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.remove_callback(interruption)
    if interruption.happened:
        step = trainer.state.global_step
        raise Interrupted(
            f"Stopped at step {step} of {trainer.state.max_steps}; checkpoint-{step} is saved. Go "
            f"on with:\n{folder.command_to_go_on(path, resolved, options.command)}"
        )
    assert trainer.train_dataset is not None
    metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}  # type: ignore[arg-type]
    trainer.save_model()
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    assert trainer.aees is not None
    logs = trainer.aees.get_logs()
    if trainer.is_world_process_zero():
        (path / "episodes.json").write_text(json.dumps(logs, indent=1) + "\n", encoding="utf-8")
    if trainer.aees.config.arms > 1:
        plays = Counter(logs["selected_lr_values"])
        parts = (f"x{k:g} {plays[k]}" for k in sorted(plays))
        write("plays of each LR multiplier: " + ", ".join(parts))


def _evaluate(
    trainer: PulseOptTrainer, resolved: Resolved, prepared: tasks.Prepared, write: Lines
) -> None:
    metrics: dict[str, Any] = {}
    trainer.remove_callback(EpochLines)  # the line below says it
    for index, rows in enumerate(prepared.validation):
        suffixes = resolved.recipe.validation_suffixes
        suffix = suffixes[index] if index < len(suffixes) else f"_{index + 1}"
        values = trainer.evaluate(rows)
        values["eval_samples"] = len(rows)
        metrics.update({f"{key}{suffix}": value for key, value in values.items()})
    trainer.save_metrics("eval", metrics)
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if history and history[0]["step"] == 0 and resolved.training.do_train:
        write(f"eval loss before training: {history[0]['eval_loss']:.3f}")
        write(f"eval loss after training:  {metrics['eval_loss']:.3f}")
    write(described(metrics))


def _predict(trainer: PulseOptTrainer, resolved: Resolved, prepared: tasks.Prepared) -> None:
    """Write predictions as GLUE wants submissions: tab-separated `index` and `prediction`."""
    assert prepared.written is not None  # tasks that predict nothing refuse `do_predict`
    trainer.compute_metrics = None  # GLUE's test sets have no true labels
    for index, rows in enumerate(prepared.test):
        names = resolved.recipe.prediction_files
        name = names[index] if index < len(names) else f"predictions{index or ''}.tsv"
        lines = prepared.written(trainer.predict(rows, metric_key_prefix="predict").predictions)
        if trainer.is_world_process_zero():
            content = ["index\tprediction", *(f"{row}\t{line}" for row, line in enumerate(lines))]
            file = Path(str(resolved.training.output_dir)) / name
            file.write_text("\n".join(content) + "\n", encoding="utf-8")
