"""What a step costs: device reads and copies, counted rather than timed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from pulseopt_hf import AEES, PulseOptTrainer
from tests.conftest import Make

READ = torch.ops.aten._local_scalar_dense.default


class CountReads(TorchDispatchMode):
    """Counts what brings a scalar from a device to the host: `.item()`, `float()`, `if`."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is READ
        return function(*args, **(kwargs or {}))


class EachStep(TrainerCallback):
    """Enters a context for each step, without what Trainer does between steps; keeps its values."""

    def __init__(self, context: Callable[[], Any]) -> None:
        self._make = context
        self.counted: list[Any] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._context = self._make()
        self.counted.append(self._context.__enter__())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._context.__exit__(None, None, None)


@pytest.mark.parametrize("noise", [[0.0], [0.01, 0.02]], ids=["LR only", "with noise"])
def test_a_step_reads_no_more_than_the_guards_one_scalar(noise: list[float], train: Make) -> None:
    def reads(*args: Any) -> list[int]:
        counter = EachStep(CountReads)
        train(*args, optim="adamw_torch", logging_strategy="no", callbacks=[counter])
        return [step.reads for step in counter.counted]

    knobs = {"lr_candidates": [0.5, 2.0], "noise_candidates": noise, "episode_length": 6}
    vanilla, pulse = reads(Trainer), reads(PulseOptTrainer, knobs)
    assert [ours - theirs for ours, theirs in zip(pulse, vanilla, strict=True)] == [1] * 24


def play(aees: AEES, step: int, loss: torch.Tensor) -> None:
    """Take a step with gradients of one, on the path of LR and noise alone."""
    optimizer = aees.optimizer
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    aees.step_start(step)
    aees.apply(optimizer.step)
    aees.settle(loss)


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_the_lr_and_noise_path_reads_the_losses_of_an_episode_in_one_copy_and_no_scalar(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[tuple[int, ...]] = []
    original = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        copies.append(tuple(self.shape))
        return original(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    parameters = [torch.nn.Parameter(torch.ones(10)), torch.nn.Parameter(torch.ones(3))]
    arms = {"lr_candidates": [0.5, 2.0], "noise_candidates": [0.1, 0.2], "noise_mode": mode}
    aees = AEES(torch.optim.SGD(parameters, lr=0.1), episode_length=5, **arms)
    with CountReads() as counter:
        for step in range(20):
            play(aees, step, torch.tensor(1.0))
    assert counter.reads == 0
    assert copies == [(5,)] * 4
