"""Designs that steer the LR by training rows held out: tried by `benchmarks/regimes.py`.

Each changes a Trainer of ours, for one training in a process of its own. A fiftieth of the training
rows, at most 256, is held out and never trained on. Their losses are read in eval mode
every few steps, which is not charged for.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pulseopt_hf.aees import controller
from pulseopt_hf.trainer import session

SHARE, MOST = 50, 256  # of the rows one in so many is held out, at most so many
AVERAGED = 10  # steps that an average of the weights looks back
DROP = 0.3


class HeldOut(TrainerCallback):
    """Reads the losses of rows held out, of the weights or of their average.

    Args:
        trainer: its training rows are fewer afterwards.
        average: whether the weights are averaged over some `AVERAGED` steps, exponentially.
    """

    def __init__(self, trainer: Any, average: bool = False) -> None:
        rows, generator = trainer.train_dataset, torch.Generator().manual_seed(trainer.args.seed)
        held = min(MOST, max(1, len(rows) // SHARE))
        order = torch.randperm(len(rows), generator=generator).tolist()
        self._rows = rows.select(order[:held])
        trainer.train_dataset = rows.select(sorted(order[held:]))
        self._trainer = trainer
        self._average: list[Tensor] | None = None
        self._wants_average = average
        trainer.add_callback(self)

    def weights(self) -> list[Tensor]:
        """Return the trained parameters."""
        return [p.data for p in self._trainer.model.parameters() if p.requires_grad]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the weights into their average."""
        if not self._wants_average:
            return
        if self._average is None:
            self._average = [weight.clone() for weight in self.weights()]
        torch._foreach_lerp_(self._average, self.weights(), 1.0 / AVERAGED)

    @torch.no_grad()
    def losses(self, size: int = 8) -> Tensor:
        """Return the loss of each batch of so many rows."""
        model, trainer = self._trainer.model, self._trainer
        own = [weight.clone() for weight in self.weights()] if self._average else []
        if self._average:
            torch._foreach_copy_(self.weights(), self._average)
        training = model.training
        model.eval()
        found, columns = [], trainer._signature_columns or self._rows.column_names
        for start in range(0, len(self._rows), size):
            rows = self._rows.select(range(start, min(start + size, len(self._rows))))
            known = [{k: row[k] for k in row if k in columns} for row in rows]
            batch = trainer.data_collator(known)
            found.append(model(**trainer._prepare_inputs(batch)).loss)
        model.train(training)
        if own:
            torch._foreach_copy_(self.weights(), own)
        return torch.stack(found)


def reward(trainer: Any, average: bool) -> Any:
    """Reward arms by how far the logarithm of the mean loss of the rows held out falls."""
    held_out = HeldOut(trainer, average)
    last = held_out.losses().mean().item()
    plain = controller.episode_reward

    def of_rows(losses: Any, **knobs: Any) -> Any:
        nonlocal last
        before, last = last, held_out.losses().mean().item()
        fall = math.log(before + knobs["epsilon"]) - math.log(last + knobs["epsilon"])
        return replace(plain(losses, **knobs), reward=fall)

    controller.episode_reward = of_rows
    return trainer


def drop(trainer: Any) -> Any:
    """Lower the LR where the loss of the rows held out has risen by more than its standard error.

    The passes over the data divide nothing then: the rows held out show what they do.
    """
    Drop(trainer)
    session.length_of_run = lambda *_: (None, 1.0)
    return trainer


class Drop(HeldOut):
    """See `drop`."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._every = max(5, trainer.args.max_steps // 40)
        self._lowest: Tensor | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lower the LR where the rows held out ask for it."""
        if state.global_step % self._every or state.global_step < 2 * self._every:
            return
        losses = self.losses(1)
        if self._lowest is None or losses.mean() < self._lowest.mean():
            self._lowest = losses
            return
        change = losses - self._lowest
        if change.mean() > change.std() / math.sqrt(len(change)):
            self._lowest = losses
            scheduler = kwargs["lr_scheduler"]
            scheduler.base_lrs = [DROP * rate for rate in scheduler.base_lrs]
            for group in kwargs["optimizer"].param_groups:
                group["lr"] *= DROP
