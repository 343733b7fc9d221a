"""What a step costs on a GPU: where the host waits for the device, and memory beside the model."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

import pulseopt_hf
from pulseopt_hf import AEES, PulseOptConfig, PulseOptTrainer
from pulseopt_hf.optim.noise import ACCELERATOR_BLOCK

pytestmark = pytest.mark.gpu

OURS = str(Path(pulseopt_hf.__file__).parent)


@contextmanager
def waits_of_ours() -> Iterator[list[str]]:
    """Note where this package's code makes the host wait for the device."""
    found: list[str] = []

    def note(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA" not in str(message):
            return
        frames = traceback.extract_stack()[:-1]  # but for this one
        caller = [frame for frame in frames if frame.filename != warnings.__file__][-1]
        if caller.filename.startswith(OURS):  # and not what Trainer does when it is called
            found.append(f"{Path(caller.filename).name}:{caller.name}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


class WaitsOfSteps(TrainerCallback):
    """Notes the waits of each optimizer step."""

    def __init__(self) -> None:
        self.per_step: list[list[str]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.context = waits_of_ours()
        self.found = self.context.__enter__()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.context.__exit__(None, None, None)
        self.per_step.append(self.found)


@pytest.mark.parametrize("noise", [[0.0], [0.01, 0.02]], ids=["LR only", "with noise"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_trainers_step_waits_for_one_scalar_and_an_episode_for_its_losses(
    noise: list[float],
    precision: str,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    on_gpu: Callable[..., Any],
) -> None:
    extra = {} if precision == "fp32" else {precision: True}
    settings = on_gpu(optim="adamw_torch_fused", logging_strategy="no", **extra)
    trainer = PulseOptTrainer(
        tiny_model(),
        settings,
        train_dataset=tiny_data,
        pulse=PulseOptConfig(
            lr_candidates=[0.5, 2.0], noise_candidates=noise, episode_length=6, calibration="off"
        ),
    )
    waits = WaitsOfSteps()
    trainer.add_callback(waits)
    trainer.train()
    assert trainer.aees is not None
    assert trainer.aees.skipped_steps == 0
    read = "guard.py:is_finite" if precision != "fp16" else "hooks.py:happened"
    for number, found in enumerate(waits.per_step, 1):
        expected = [read] if number % 6 else [read, "agreement.py:mean"]
        assert found == expected, number


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["LR a number", "LR a tensor"])
def test_the_lr_and_noise_path_itself_never_waits(mode: str, tensor_lr: bool) -> None:
    parameters = [torch.nn.Parameter(torch.ones(1000, 10, device="cuda")) for _ in range(3)]
    lr = torch.tensor(0.1, device="cuda") if tensor_lr else 0.1
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    aees = AEES(
        optimizer,
        lr_candidates=[0.5, 2.0],
        noise_candidates=[0.1, 0.2],
        noise_mode=mode,
        episode_length=5,
    )
    loss = torch.ones((), device="cuda")
    for step in range(20):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        # The first step makes the optimizer's state; the last of an episode reads its losses.
        torch.cuda.set_sync_debug_mode("default" if step == 0 or step % 5 == 4 else "error")
        try:
            aees.step_start(step)
            aees.apply(optimizer.step)
            aees.settle(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(aees.controller.records) == 4


def peak_of(train: Callable[[], object]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train()
    return torch.cuda.max_memory_allocated()


def test_memory_beyond_the_models_is_bounded_and_so_is_that_of_calibration(
    on_gpu: Callable[..., Any],
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 1000, (64, 32))]

    def peak(config: PulseOptConfig | None) -> int:
        torch.manual_seed(0)
        sizes = GPT2Config(vocab_size=1000, n_positions=32, n_embd=1024, n_layer=8, n_head=8)
        model = GPT2LMHeadModel(sizes).cuda()
        settings = on_gpu(max_steps=60, logging_strategy="no", optim="adamw_torch_fused", bf16=True)
        kind, extra = (Trainer, {}) if config is None else (PulseOptTrainer, {"pulse": config})
        trainer = kind(model, settings, train_dataset=rows, **extra)
        found = peak_of(trainer.train)
        if config is not None and config.calibration == "trust_region":
            assert trainer.aees.calibrator.search.learning_rate is not None
        return found

    plain = peak(None)
    parameters = 8 * 12 * 1024**2  # about
    largest = 4 * 1024 * 4096  # bytes of the largest weight matrix
    assert plain > 1.5e9  # there was something to copy
    off = {"lr_candidates": [0.5, 2.0], "episode_length": 5, "calibration": "off"}
    small = 1 << 20  # losses, norms and scalars
    assert peak(PulseOptConfig(**off)) - plain <= small
    noise = 4 * ACCELERATOR_BLOCK
    assert peak(PulseOptConfig(**off, noise_candidates=[0.01])) - plain <= noise + small
    # A trial is measured one matrix at a time, and by outputs of bounded size. Under autocast the
    # probe's forward keeps the weights in 16 bits, as any forward does, and gradients are there.
    calibration = PulseOptConfig(calibration="trust_region")
    assert peak(calibration) - plain <= 2 * parameters + 3 * largest + noise
