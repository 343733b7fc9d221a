"""What a Trainer's run says to calibration: whether it is to be done, and how long the run is."""

from __future__ import annotations

import logging
import math
from collections.abc import Sized
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from pulseopt_hf.aees.calibration import SHORTEST_RUN, not_calibrated
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import calibrator
from pulseopt_hf.trainer.upstream import searched_arguments

logger = logging.getLogger("pulseopt_hf")

# TRL's Trainers that learn from examples. Its others optimise a preference or a reward, or take
# turns with a generation; their LRs are far below those of supervised training, for reasons that
# one step does not show.
_SUPERVISED = ("SFTTrainer", "RewardTrainer", "PRMTrainer")


def is_to_calibrate(trainer: Any, config: PulseOptConfig, max_steps: int, *, asked: bool) -> bool:
    """Return whether the LR of a run that begins is to be calibrated; log why not, once.

    Args:
        trainer: the Trainer.
        config: the knobs.
        max_steps: optimizer steps of the run.
        asked: whether the run is there for that alone.

    Raises:
        ValueError: it cannot be, and was asked for.
    """
    if config.calibration == "off":
        return False
    reason = why_not_calibrate(trainer, config, max_steps)
    if reason is not None and asked:
        raise ValueError(not_calibrated(reason))
    if reason is not None and trainer.is_world_process_zero():
        logger.warning(not_calibrated(reason))
    return reason is None


def why_not_calibrate(trainer: Any, config: PulseOptConfig, max_steps: int) -> str | None:
    """Return why the LR of a run is not to be calibrated, or `None` where it is.

    Args:
        trainer: the Trainer, when training begins.
        config: the knobs; a calibration that is asked for by name is left out only where it cannot
            be done.
        max_steps: optimizer steps of the run.
    """
    if max_steps < SHORTEST_RUN:
        return f"{max_steps} steps are too few, {SHORTEST_RUN} are needed"
    if config.calibration == "auto":
        if "learning_rate" in searched_arguments(trainer):
            return "a search over `learning_rate` is going on"
        if (name := unsupervised(type(trainer))) is not None:
            return (
                f"{name} optimises a preference or a reward, for which this was never checked; "
                "calibration='trust_region' asks for it by name"
            )
    return calibrator.why_not_calibrate(trainer.optimizer, config)


def length_of_run(arguments: TrainingArguments, batches: object) -> tuple[int | None, float]:
    """Return the optimizer steps of a run, and how often it goes over its training data.

    Args:
        arguments: those of the run.
        batches: what it iterates over. Without a length, `max_steps` does not say how often, which
            counts as once, and a number of epochs does not say how many steps, which is `None`.
    """
    steps, passes = arguments.max_steps, max(1.0, float(arguments.num_train_epochs))
    if not isinstance(batches, Sized) or not has_length(batches):
        return (steps, 1.0) if steps > 0 else (None, passes)
    per_pass = max(1, math.ceil(len(batches) / arguments.gradient_accumulation_steps))
    if steps > 0:
        micro_batches = steps * arguments.gradient_accumulation_steps
        return steps, max(1.0, micro_batches / max(1, len(batches)))
    return math.ceil(arguments.num_train_epochs * per_pass), passes


def unsupervised(trainer_class: type) -> str | None:
    """Return the name of a Trainer's TRL class, if that does not learn from examples."""
    ours = [cls for cls in trainer_class.__mro__ if cls.__module__.partition(".")[0] == "trl"]
    named = [cls.__name__ for cls in ours if cls.__name__.endswith("Trainer")]
    if not named or any(name in _SUPERVISED for name in named):
        return None
    return next(name for name in named if not name.startswith("PulseOpt"))
