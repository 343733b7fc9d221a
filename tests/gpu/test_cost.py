"""What a step costs on a GPU: where the host waits for the device, and memory beside the model."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import pulseopt_hf
from pulseopt_hf import AEES, PulseOptTrainer
from pulseopt_hf.optim.noise import ACCELERATOR_BLOCK
from tests.conftest import Make
from tests.invariant.test_cost import EachStep, play

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


@pytest.mark.parametrize("noise", [[0.0], [0.01, 0.02]], ids=["LR only", "with noise"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_trainers_step_waits_for_one_scalar_and_an_episode_for_its_losses(
    noise: list[float], precision: str, train: Make, on_gpu: Make
) -> None:
    extra = {} if precision == "fp32" else {precision: True}
    knobs = {"lr_candidates": [0.5, 2.0], "noise_candidates": noise, "episode_length": 6}
    waits = EachStep(waits_of_ours)
    trainer = train(
        pulse={**knobs, "calibration": "off"},
        args=on_gpu(optim="adamw_torch_fused", logging_strategy="no", **extra),
        callbacks=[waits],
    )
    assert trainer.aees.skipped_steps == 0
    read = "nonfinite.py:is_finite" if precision != "fp16" else "hooks.py:happened"
    for number, found in enumerate(waits.counted, 1):
        expected = [read] if number % 6 else [read, "agreement.py:mean"]
        assert found == expected, number


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["LR a number", "LR a tensor"])
def test_the_lr_and_noise_path_itself_never_waits(mode: str, tensor_lr: bool) -> None:
    parameters = [torch.nn.Parameter(torch.ones(1000, 10, device="cuda")) for _ in range(3)]
    lr = torch.tensor(0.1, device="cuda") if tensor_lr else 0.1
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    arms = {"lr_candidates": [0.5, 2.0], "noise_candidates": [0.1, 0.2], "noise_mode": mode}
    aees = AEES(optimizer, episode_length=5, **arms)
    loss = torch.ones((), device="cuda")
    for step in range(20):
        # The first step makes the optimizer's state; the last of an episode reads its losses.
        torch.cuda.set_sync_debug_mode("default" if step == 0 or step % 5 == 4 else "error")
        try:
            play(aees, step, loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(aees.controller.records) == 4


def test_memory_beyond_the_models_is_bounded_and_so_is_that_of_calibration(make_trainer, on_gpu):
    from transformers import GPT2Config, GPT2LMHeadModel

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 1000, (64, 32))]

    def peak(**knobs: Any) -> int:
        torch.manual_seed(0)
        sizes = GPT2Config(vocab_size=1000, n_positions=32, n_embd=1024, n_layer=8, n_head=8)
        trainer = make_trainer(
            PulseOptTrainer if knobs else Trainer,
            knobs or None,
            model=GPT2LMHeadModel(sizes).cuda(),
            args=on_gpu(max_steps=60, logging_strategy="no", optim="adamw_torch_fused", bf16=True),
            train_dataset=rows,
        )
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        if knobs.get("calibration") == "trust_region":
            assert trainer.aees.calibrator.search.learning_rate is not None
        return torch.cuda.max_memory_allocated()

    plain = peak()
    parameters = 8 * 12 * 1024**2  # about
    largest = 4 * 1024 * 4096  # bytes of the largest weight matrix
    assert plain > 1.5e9  # there was something to copy
    off = {"lr_candidates": [0.5, 2.0], "episode_length": 5, "calibration": "off"}
    small = 1 << 20  # losses, norms and scalars
    assert peak(**off) - plain <= small
    noise = 4 * ACCELERATOR_BLOCK
    assert peak(**off, noise_candidates=[0.01]) - plain <= noise + small
    # A trial is measured one matrix at a time, and by outputs of bounded size. Under autocast the
    # probe's forward keeps the weights in 16 bits, as any forward does, and gradients are there.
    assert peak(calibration="trust_region") - plain <= 2 * parameters + 3 * largest + noise
