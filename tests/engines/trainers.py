"""Trainers that run on a CPU what Trainer itself runs only on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from pulseopt_hf import PulseOptTrainer


class CpuFp16:
    """Gives a Trainer with `fp16=True` what Accelerate leaves out on a CPU.

    Autocast then really computes in float16, and the scaler is a real one.
    """

    init_scale = 2.0**22  # overflows at once, so that the first steps are skipped

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator: Any
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=self.init_scale, growth_interval=3
        )
        self.accelerator.native_amp = True


class Fp16Trainer(CpuFp16, Trainer):
    pass


class Fp16PulseTrainer(CpuFp16, PulseOptTrainer):
    pass
