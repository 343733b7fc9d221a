"""What is compared: each method as a user of it would set it up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState

from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.errors import UsageError, needs_extra

ARMS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Method:
    """One way to train."""

    words: str  # keys of a recipe, as the command line gives them
    about: str
    change: Callable[[Any], object] | None = None  # of the Trainer that the recipe makes
    ignores_lr: bool = False  # the base LR means nothing to it
    evaluations: int = 0  # of the validation data, that it steers by
    calibrates: bool = False  # it may, and has to pay for what that takes


class PublishedSteps(TrainerCallback):
    """Has the package `pulseopt`, with these knobs, take the optimizer steps of a Trainer.

    The package sees one loss an optimizer step, so gradients cannot accumulate.
    """

    def __init__(self, trainer: Trainer, **knobs: Any) -> None:
        with needs_extra("The method `pulseopt`", "peers"):
            from pulseopt import AEES
        if trainer.args.gradient_accumulation_steps != 1:
            raise UsageError("`pulseopt` cannot run with `gradient_accumulation_steps` above 1.")
        self._make: Any = functools.partial(AEES, seed=trainer.args.seed, **knobs)
        self._training_step = trainer.training_step
        trainer.training_step = self._noting_the_loss  # type: ignore[method-assign]
        trainer.add_callback(self)

    def _noting_the_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        self._loss = self._training_step(*args, **kwargs)
        return self._loss

    def on_train_begin(self, *event: Any, **kwargs: Any) -> None:
        """Put the published step round that of the torch optimizer."""
        optimizer = kwargs["optimizer"].optimizer
        self._plain_step = plain = optimizer.step
        stepped = SimpleNamespace(param_groups=optimizer.param_groups, step=plain)
        self._published = self._make(stepped)

        @functools.wraps(plain)  # a scheduler has marked it, and would warn
        def published_step(closure: Any = None) -> None:
            self._published.step_end(self._loss)

        optimizer.step = published_step

    def on_step_begin(self, args: Any, state: TrainerState, *event: Any, **kwargs: Any) -> None:
        """Begin a published step; Trainer's optimizer step ends it."""
        self._published.step_start(state.global_step)

    def on_train_end(self, *event: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was."""
        kwargs["optimizer"].optimizer.step = self._plain_step


def _published(trainer: Trainer) -> None:
    """Give it episodes as long as this package would choose them."""
    config = PulseOptConfig.published(lr_candidates=[*ARMS], episode_length=None)
    length = config.for_run(trainer.args.max_steps, trainer.args.seed).episode_length
    PublishedSteps(trainer, lr_candidates=[*ARMS], noise_candidates=[0.0], episode_length=length)


def _prodigy(trainer: Any) -> None:
    with needs_extra("`prodigy`", "peers"):
        from prodigyopt import Prodigy
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = Prodigy(parameters, lr=1.0, safeguard_warmup=True)


_OFF, _ARMS = "--calibration off", "--lr_candidates 0.5 1.0 2.0"
_CONSTANT = f"{_OFF} --lr_candidates 1.0"
_FREE = "--optim schedule_free_adamw --lr_scheduler_type constant"

METHODS = {
    "static": Method(_CONSTANT, "the recipe's optimizer and schedule at this base LR"),
    "random": Method(f"{_OFF} {_ARMS} --control_mode random", "arms 0.5, 1, 2 at random"),
    "published": Method(
        f"{_OFF} {_ARMS} --bandit discounted_ucb --reward smoothed",
        "arms 0.5, 1, 2 played by the bandit of pulseopt 0.3.0",
    ),
    "default": Method("", "the recipe unchanged", calibrates=True),
    "scaled_ucb": Method(f"{_OFF} {_ARMS}", "arms 0.5, 1, 2 played by the scaled bandit"),
    "default_arms": Method(
        f"{_ARMS} --bandit conservative_ucb",
        "the default with arms 0.5, 1, 2 played by the conservative bandit",
        calibrates=True,
    ),
    "pulseopt": Method(
        _CONSTANT, "arms 0.5, 1, 2 by the package pulseopt itself", change=_published
    ),
    "greedy": Method(
        f"{_CONSTANT} --lr_scheduler_type greedy",
        "Transformers' GreedyLR, with ten evaluations that it is not charged for",
        evaluations=10,
    ),
    "schedule_free": Method(
        f"{_CONSTANT} {_FREE}", "schedule-free AdamW (Defazio et al., arXiv 2405.15682)"
    ),
    "prodigy": Method(
        _CONSTANT,
        "Prodigy at its own LR of 1 (Mishchenko and Defazio, arXiv 2306.06101)",
        change=_prodigy,
        ignores_lr=True,
    ),
}
