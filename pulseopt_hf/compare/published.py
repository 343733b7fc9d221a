"""The published package `pulseopt` in Trainer's loop, as its user would wire it in."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import Trainer

from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.errors import UsageError, needs_extra


class PublishedTrainer(Trainer):
    """A Trainer whose optimizer step is that of `pulseopt.AEES`.

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


def published_trainer(trainer: Trainer) -> Trainer:
    """Return a Trainer that trains the same model on the same data by the published package.

    With arms 0.5, 1 and 2, and episodes as long as this package would choose them.
    """
    arms = [0.5, 1.0, 2.0]
    config = PulseOptConfig.published(lr_candidates=arms, episode_length=None)
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
        lr_candidates=arms,
        noise_candidates=[0.0],
        episode_length=length,
    )
