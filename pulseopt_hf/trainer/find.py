"""The learning rate of a Trainer, found without training it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from pulseopt_hf.aees.calibration import SHORTEST_RUN
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim.kept_model import kept_model
from pulseopt_hf.optim.randomness import kept_random_state
from pulseopt_hf.optim.suggestion import Suggestion, suggest
from pulseopt_hf.optim.unwrap import innermost
from pulseopt_hf.trainer.callback import PulseOptCallback
from pulseopt_hf.trainer.mixin import PulseOptMixin, connect, with_pulseopt
from pulseopt_hf.trainer.session import LearningRateFound


def find_learning_rate(
    trainer: Trainer | None = None,
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    passes: float = 1.0,
    max_steps: int | None = None,
) -> Suggestion:
    """Find the learning rate without training: take a few trial steps and undo each.

        suggestion = find_learning_rate(trainer)
        suggestion = find_learning_rate(
            model=model, optimizer=optimizer, batches=loader, loss=lambda model, batch: ...
        )
        suggestion.learning_rate

    Afterwards, parameters, optimizer, scheduler, global random states and the order of the data are
    as before, bit for bit. The search takes at most twenty batches, in the order of training. A
    stream that cannot restart loses them.

    Args:
        trainer: any Trainer, before or after training. Its callbacks are not called.
        model: for your own loop: the model as the loop calls it.
        optimizer: for your own loop: the optimizer, with the LR to start from.
        batches: for your own loop: what it iterates over.
        loss: for your own loop: calls the model with a batch and returns the loss, shape ().
        passes: for your own loop: its number of passes over the data. A Trainer's arguments
            already say it, and the next one.
        max_steps: for your own loop: its number of optimizer steps, if that is known.

    Returns:
        The learning rate, what limits it, and the trials.

    Raises:
        TypeError: neither a Trainer nor all of `model`, `optimizer`, `batches` and `loss` are
            given.
        ValueError: the LR that is set is zero, the optimizer cannot be calibrated, or the Trainer
            uses DeepSpeed, whose engine changes a model for good.
    """
    if trainer is None:
        if model is None or optimizer is None or batches is None or loss is None:
            raise TypeError(
                "`find_learning_rate` takes a Trainer, or `model`, `optimizer`, `batches` and "
                "`loss` of a loop of your own."
            )
        return suggest(model, optimizer, batches, loss, passes, max_steps)
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "Under DeepSpeed the learning rate cannot be found without training, since its engine "
            "changes the model for good. Train with calibration='trust_region'."
        )
    made: Any = trainer
    with kept_random_state(trainer.args.device), kept_model(made.model), _as_before(made):
        arguments, made.args = made.args, copy.copy(made.args)
        made.args.max_steps = SHORTEST_RUN  # also where the data is less than that
        made.args.eval_on_start = False
        made.callback_handler.callbacks = []
        named = PulseOptConfig(calibration="trust_region")
        connect(made, PulseOptCallback(named), arguments)
        if not isinstance(made, PulseOptMixin):
            made.__class__ = with_pulseopt(type(made))
        with suppress(LearningRateFound):
            made.train()
        aees = made._pulse.latest
        return Suggestion.of(aees.calibrator)


@contextmanager
def _as_before(trainer: Any) -> Iterator[None]:
    """Put back all that a training which moves no parameter changes in a Trainer."""
    kind, model, optimizer = type(trainer), trainer.model, innermost(trainer.optimizer)
    accelerator = trainer.accelerator
    changing = [trainer, trainer.control, trainer.callback_handler, accelerator]
    changing += [accelerator.gradient_state, accelerator.scaler, trainer.lr_scheduler]
    # Accelerate marks what it has prepared, and wraps `forward` for mixed precision.
    kept = [*changing, trainer.optimizer, optimizer, model]
    attributes = [(one, vars(one).copy()) for one in kept if one is not None]
    groups = [] if optimizer is None else [dict(group) for group in optimizer.param_groups]
    # What training counts and collects goes into copies.
    for one in changing:
        if one is not None:
            vars(one).update({name: _copied(value) for name, value in vars(one).items()})
    try:
        yield
    finally:
        handle = getattr(trainer, "neftune_hook_handle", None)
        if handle is not None:
            handle.remove()
        trainer.__class__ = kind
        for one, before in attributes:
            vars(one).clear()
            vars(one).update(before)
        if optimizer is not None:
            for group, saved in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(saved)


def _copied(value: Any) -> Any:
    """Copy tensors and nested containers, not the objects in them."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.clone()
    if isinstance(value, dict):
        result = copy.copy(value)
        result.update({key: _copied(item) for key, item in value.items()})
        return result
    if isinstance(value, list | deque):
        items = copy.copy(value)
        items.clear()
        items.extend(_copied(item) for item in value)
        return items
    return set(value) if isinstance(value, set) else value
