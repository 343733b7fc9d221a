"""What is compared: each method as a user of it would set it up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Trainer

from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.errors import UsageError, needs_extra

ARMS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Method:
    """One way to train."""

    words: str  # keys of a recipe, as the command line gives them
    about: str
    optimizer: Callable[[Any], Any] | None = None  # makes its own of the model's parameters
    trainer: Callable[[Any], Any] | None = None  # makes its own of the recipe's
    ignores_lr: bool = False  # the base LR means nothing to it
    evaluations: int = 0  # of the validation data, that it steers by
    calibrates: bool = False  # it may, and has to pay for what that takes


class PublishedTrainer(Trainer):
    """A Trainer whose optimizer step is that of the package `pulseopt`.

    The package sees one loss an optimizer step, so gradients cannot accumulate.

    Args:
        *args: Trainer's.
        lr_candidates: LR multipliers.
        noise_candidates: noise levels.
        episode_length: optimizer steps in an episode.
        **kwargs: Trainer's.

    Raises:
        UsageError: `pulseopt` is not installed, or gradients accumulate.
    """

    def __init__(
        self,
        *args: Any,
        lr_candidates: list[float],
        noise_candidates: list[float],
        episode_length: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        with needs_extra("The method `pulseopt`", "peers"):
            from pulseopt import AEES
        if self.args.gradient_accumulation_steps != 1:
            raise UsageError("`pulseopt` cannot run with `gradient_accumulation_steps` above 1.")
        self._make: Any = functools.partial(
            AEES,
            lr_candidates=lr_candidates,
            noise_candidates=noise_candidates,
            episode_length=episode_length,
            seed=self.args.seed,
        )
        self._published: Any = None
        self._plain_step: Any = None
        self._step_loss: Tensor | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave the optimizer as it was."""
        self._published = None
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._published is not None:
                optimizer: Any = self.optimizer
                optimizer.step = self._plain_step

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Begin a published step before the forward pass; Trainer's optimizer step ends it."""
        optimizer: Any = self.optimizer
        if self._published is None:
            self._plain_step = optimizer.step
            self._published = self._make(optimizer.optimizer)
            optimizer.step = lambda closure=None: self._published.step_end(self._step_loss)
        self._published.step_start(self.state.global_step)
        self._step_loss = super().training_step(*args, **kwargs)
        return self._step_loss


def _published(trainer: Trainer) -> Trainer:
    """Make it of a recipe's Trainer, with episodes as long as this package would choose them."""
    config = PulseOptConfig.published(lr_candidates=[*ARMS], episode_length=None)
    length = config.for_run(trainer.args.max_steps, trainer.args.seed).episode_length
    assert length is not None
    return PublishedTrainer(
        trainer.model,
        trainer.args,
        data_collator=trainer.data_collator,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.processing_class,
        preprocess_logits_for_metrics=trainer.preprocess_logits_for_metrics,
        lr_candidates=[*ARMS],
        noise_candidates=[0.0],
        episode_length=length,
    )


def _prodigy(parameters: Any) -> Any:
    with needs_extra("`prodigy`", "peers"):
        from prodigyopt import Prodigy
    return Prodigy(parameters, lr=1.0, safeguard_warmup=True)


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
        _CONSTANT, "arms 0.5, 1, 2 by the package pulseopt itself", trainer=_published
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
        optimizer=_prodigy,
        ignores_lr=True,
    ),
}
