"""Trainers that do on a CPU what Trainer does only on a GPU, that fail, and that are watched."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer

from pulseopt_hf import PulseOptTrainer
from tests.conftest import on


class CpuFp16:
    """Gives a Trainer with `fp16=True` what Accelerate leaves out on a CPU.

    Autocast then really computes in float16, and the scaler is a real one.
    """

    init_scale = 2.0**22  # overflows at once, so that the first steps are skipped
    foreach: bool | None = None  # of the optimizer

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator: Any
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=self.init_scale, growth_interval=3
        )
        self.accelerator.native_amp = True

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        for group in optimizer.param_groups:
            group["foreach"] = self.foreach
        return optimizer


def fp16(base: type = PulseOptTrainer, **attributes: Any) -> type[Trainer]:
    """Return a class of Trainers with attributes of `CpuFp16`."""
    return type("Fp16", (CpuFp16, base), attributes)


def bad_loss(
    *steps: int,
    rank: int = 0,
    value: float = float("nan"),
    only_loss: bool = False,
    base: type = PulseOptTrainer,
) -> type[Trainer]:
    """Return a class of Trainers whose loss is not finite on one rank at some global steps.

    Gradients are not finite either, but for `only_loss`.
    """

    class BadLoss(base):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            is_bad = self.state.global_step in steps and self.args.process_index == rank
            if is_bad:
                return loss + value if only_loss else loss * value
            return loss

    return BadLoss


class Sgd(PulseOptTrainer):
    """With SGD an update is the learning rate times the gradient, so noise can be read off.

    The optimizer also has what is frozen, which Trainer's own leaves out.
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


class Watch:
    """Keeps what a look at a Trainer shows before the first step and after each of the first 30."""

    def __init__(self, trainer: Any, look: Callable[[Any], Any]) -> None:
        self.seen: list[Any] = []

        def begin(*args: Any, **kwargs: Any) -> None:
            if not self.seen:
                self.seen.append(look(trainer))

        def end(state: Any, **kwargs: Any) -> None:
            if state.global_step <= 30:
                self.seen.append(look(trainer))

        for event, note in (("on_step_begin", begin), ("on_step_end", end)):
            trainer.add_callback(on(event, note))
