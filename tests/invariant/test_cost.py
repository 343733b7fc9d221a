"""What a step costs: device reads, collectives and copies, counted rather than timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from pulseopt_hf import AEES, PulseOptConfig, PulseOptTrainer

READ = torch.ops.aten._local_scalar_dense.default


class CountReads(TorchDispatchMode):
    """Counts what brings a scalar from a device to the host: `.item()`, `float()`, `if`."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.reads += function is READ
        return function(*args, **(kwargs or {}))


class ReadsOfSteps(TrainerCallback):
    """Counts the reads of each optimizer step, without what Trainer does between steps."""

    def __init__(self) -> None:
        self.per_step: list[int] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.counter = CountReads()
        self.counter.__enter__()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.counter.__exit__(None, None, None)
        self.per_step.append(self.counter.reads)


def reads(trainer: Trainer) -> list[int]:
    counter = ReadsOfSteps()
    trainer.add_callback(counter)
    trainer.train()
    return counter.per_step


@pytest.mark.parametrize("noise", [[0.0], [0.01, 0.02]], ids=["LR only", "with noise"])
def test_a_step_reads_no_more_than_the_guards_one_scalar(
    tiny_model: Any, tiny_data: Any, arguments: Any, noise: list[float]
) -> None:
    settings = {"optim": "adamw_torch", "logging_strategy": "no"}
    vanilla = reads(Trainer(tiny_model(), arguments(**settings), train_dataset=tiny_data))
    pulse = reads(
        PulseOptTrainer(
            tiny_model(),
            arguments(**settings),
            train_dataset=tiny_data,
            pulse=PulseOptConfig(
                lr_candidates=[0.5, 2.0], noise_candidates=noise, episode_length=6
            ),
        )
    )
    assert [ours - theirs for ours, theirs in zip(pulse, vanilla, strict=True)] == [1] * 24


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_the_lr_and_noise_path_itself_reads_nothing(mode: str) -> None:
    parameters = [torch.nn.Parameter(torch.ones(10)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    aees = AEES(
        optimizer,
        lr_candidates=[0.5, 2.0],
        noise_candidates=[0.1, 0.2],
        noise_mode=mode,
        episode_length=5,
    )
    with CountReads() as counter:
        for step in range(20):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            aees.step_start(step)
            aees.apply(optimizer.step)
            aees.settle(torch.tensor(1.0))
    assert counter.reads == 0  # the losses of an episode come in one copy, which is not a scalar


def test_the_losses_of_an_episode_are_read_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[tuple[int, ...]] = []
    original = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        copies.append(tuple(self.shape))
        return original(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    aees = AEES(optimizer, lr_candidates=[0.5, 2.0], episode_length=5)
    for step in range(20):
        parameter.grad = torch.ones(2)
        aees.step_start(step)
        aees.apply(optimizer.step)
        aees.settle(torch.tensor(1.0))
    assert copies == [(5,)] * 4


class CountAllocations(TorchDispatchMode):
    """Notes the size of the largest tensor that any operator returns, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {id(argument) for argument in args}
        if isinstance(result, torch.Tensor) and id(result) not in given:
            shares = any(
                isinstance(a, torch.Tensor)
                and a.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
                for a in args
            )
            self.largest = max(self.largest, 0 if shares else result.numel())
        return result


def test_nothing_of_the_models_size_is_allocated() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3_000_000))
    parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD([parameter], lr=0.1, foreach=False)
    aees = AEES(optimizer, lr_candidates=[0.5], noise_candidates=[0.1], episode_length=5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mode does not see what other threads do
    try:
        with CountAllocations() as counter:
            for step in range(3):
                aees.step_start(step)
                aees.apply(optimizer.step)
                aees.settle(1.0)
    finally:
        torch.set_num_threads(threads)
    assert 0 < counter.largest <= 1 << 17
