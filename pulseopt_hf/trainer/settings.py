"""The knobs of a Trainer's run, and what Trainer cannot be combined with."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

from transformers import TrainingArguments

from pulseopt_hf.aees.json_checks import anything, field, integer
from pulseopt_hf.config import PulseOptConfig, PulseOptKnobs
from pulseopt_hf.trainer import deepspeed

logger = logging.getLogger("pulseopt_hf")


def run_config(
    trainer: Any, given: PulseOptConfig | None, max_steps: int, saved: object | None
) -> PulseOptConfig:
    """Return the knobs of a run that begins, with all that follows from the run filled in.

    Args:
        trainer: the Trainer.
        given: the knobs; for `None` see `PulseOptCallback`.
        max_steps: optimizer steps of the run.
        saved: the state of the checkpoint that is resumed, if one is.

    Raises:
        ValueError: an episode is longer than the run.
        StateError: the saved state has no episode length.
    """
    config, args = given, trainer.args
    if config is None:
        # Read at every start: a hyperparameter search sets knobs between trials.
        is_with_knobs = isinstance(args, PulseOptKnobs)
        config = PulseOptConfig.of_knobs(args) if is_with_knobs else PulseOptConfig()
    if (idle := config.idle_knobs()) and trainer.is_world_process_zero():
        logger.warning(
            "%s has no effect with one arm. Give several `lr_candidates` or `noise_candidates`.",
            " and ".join(f"`{name}`" for name in idle),
        )
    unset = config.episode_length is None
    config = config.for_run(max_steps, args.seed)
    if unset and saved is not None:
        # A resumed run may be made longer; its episodes keep the length they had.
        settings = field(field(saved, "controller", anything), "settings", anything)
        length = field(settings, "episode_length", integer)
        config = dataclasses.replace(config, episode_length=length)
    assert config.episode_length is not None
    episodes = max_steps // config.episode_length
    if 1 < config.arms and episodes < config.arms:
        warnings.warn(
            f"{max_steps} steps make {episodes} episodes of {config.episode_length} steps for "
            f"{config.arms} arms, so not every arm is tried. Set `episode_length` to at most "
            f"{max(1, max_steps // config.arms)}, or give fewer candidates.",
            stacklevel=2,
        )
    return config


def check_given_once(args: TrainingArguments) -> None:
    """Refuse knobs in the training arguments, where there is a config as well.

    Raises:
        ValueError: some are set.
    """
    if isinstance(args, PulseOptKnobs) and PulseOptConfig.of_knobs(args) != PulseOptConfig():
        raise ValueError(
            "The knobs were given twice: in the training arguments and in a PulseOptConfig. Give "
            "them once."
        )


def check_optimizer(trainer: Any) -> None:
    """Refuse an optimizer or engine that no arm would reach.

    Raises:
        ValueError: the Trainer's is one.
    """
    # Events hand out no accelerator, and `check_events` refuses DeepSpeed there.
    if trainer.is_deepspeed_enabled and trainer.accelerator is not None:
        deepspeed.check_settings(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in optim or "layerwise" in optim:
        raise ValueError(
            f"`optim={optim}` updates parameters during the backward pass, so there is no step for "
            "an arm to apply to. Choose an optimizer that steps, such as `adamw_torch`."
        )


def check_events(trainer: Any, config: PulseOptConfig) -> None:
    """Refuse what needs more than a Trainer's events.

    Raises:
        RuntimeError: there are arms, or DeepSpeed's engine steps.
    """
    arms = [config.lr_candidates, config.noise_candidates]
    if arms != [[1.0], [0.0]] or trainer.is_deepspeed_enabled:
        raise RuntimeError(
            "PulseOptCallback is not attached, and no event hands it the loss, which arms need, or "
            "DeepSpeed's engine. Write `PulseOptCallback(config).attach(trainer)`, or use "
            "PulseOptTrainer."
        )
