"""What the tests of the engines share: FSDP2 on CPU."""

from __future__ import annotations

from typing import Any

import accelerate.state
import pytest


@pytest.fixture
def fsdp2_on_cpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
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
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "GPT2Block"},
    }
