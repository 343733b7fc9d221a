"""What this package needs of Transformers and Accelerate beyond their public names, in one place.

Each entry says why no public name will do, and has a test in `tests/trainer/test_upstream.py` that
fails when upstream changes it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pulseopt_hf.optim.unwrap import is_stepped_by_deepspeed

# `Trainer._save_checkpoint` is the only moment, between an optimizer step and the checkpoint's
# files, at which every rank takes part: `on_save` comes after the files, and the state of callbacks
# is asked for on rank 0 alone. Transformers 5.6 - 5.24.
SAVE_CHECKPOINT = "_save_checkpoint"

# `Trainer._get_grad_norm` returns the norm that Trainer has computed before a step, whether it
# clips or not and whatever the gradients' meshes are. Events carry none. Transformers 5.6 - 5.24.
GRAD_NORM = "_get_grad_norm"


def run_folder(trainer: Any) -> Path:
    """Return the folder of the run that a Trainer has begun, a trial's own in a search.

    No event hands on the trial of a hyperparameter search, which `train` keeps in `_trial`.
    Transformers 5.6 - 5.24.
    """
    return Path(trainer._get_output_dir(trial=trainer._trial))


def checkpoint_folder(trainer: Any) -> Path:
    """Return the folder of the checkpoint of the step that a Trainer is at.

    Trainer puts its name together inside `_save_checkpoint`. Transformers 5.6 - 5.24.
    """
    return run_folder(trainer) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"


def searched_arguments(trainer: Any) -> Collection[str]:
    """Return the names of the arguments that a hyperparameter search sets for the run that begins.

    `train` keeps the trial in `_trial`; no event hands it on. An Optuna trial suggests the same
    values when it is asked again. Transformers 5.6 - 5.24.
    """
    trial = getattr(trainer, "_trial", None)
    if trial is None:
        return ()
    names: Collection[str] = trial if isinstance(trial, dict) else trainer.hp_space(trial)
    return names


def mark_step_skipped(optimizer: Any, skipped: bool) -> None:
    """Tell Trainer, which asks `accelerator.optimizer_step_was_skipped`, what became of a step.

    Trainer advances the LR scheduler unless that says so, and the property has no setter: it reads
    `AcceleratedOptimizer._is_overflow`. Accelerate itself leaves that at False when a fused
    optimizer skips an overflow in its kernel (accelerate issue 4242). Its wrapper of a DeepSpeed
    optimizer asks that for `overflow`, if it had one when it was wrapped; those that do not look
    for overflow have none. Accelerate 1.1 - 1.15.
    """
    if is_stepped_by_deepspeed(optimizer):
        optimizer.optimizer.overflow = skipped
        optimizer.__has_overflow__ = True
    else:
        optimizer._is_overflow = skipped
