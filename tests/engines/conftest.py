"""Fixtures of the engines: a Trainer with a real GradScaler on CPU, and FSDP2 on CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import accelerate.state
import pytest
import torch
from transformers import Trainer

from pulseopt_hf import PulseOptTrainer


class CpuFp16:
    """Gives a Trainer with `fp16=True` what Accelerate leaves out on a CPU: autocast and a scaler."""

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


@pytest.fixture
def fsdp2_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Let Accelerate choose FSDP on CPU, and return the training arguments that ask for it.

    Accelerate upgrades only GPU types to FSDP and would silently run DDP.
    """
    plain_init = accelerate.state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plugin = kwargs.get("fsdp_plugin")
        plain_init(self, *args, **kwargs)
        multi_cpu = accelerate.state.DistributedType.MULTI_CPU
        if plugin is not None and self.distributed_type == multi_cpu:
            self.distributed_type = accelerate.state.DistributedType.FSDP
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            state = accelerate.state.PartialState._shared_state
            state["distributed_type"] = self.distributed_type

    monkeypatch.setattr(accelerate.state.AcceleratorState, "__init__", init)
    yield {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "GPT2Block"},
    }
