"""The engines on CPU ranks: how each is asked for, how one knows that it is on, how a run ended."""

from dataclasses import dataclass
from typing import Any

import accelerate.state
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def settings_of(engine: str, **overrides: Any) -> dict[str, Any]:
    """Return the training arguments that ask for an engine.

    Args:
        engine: `ddp`, `fsdp2`, or `zero0` to `zero3` for a stage of DeepSpeed.
        overrides: of the engine's own config.
    """
    if engine == "ddp":
        return {}
    if engine == "fsdp2":
        blocks = {"version": 2, "transformer_layer_cls_to_wrap": "GPT2Block"}
        return {"fsdp": True, "fsdp_config": {**blocks, **overrides}}
    return {"deepspeed": deepspeed_config(int(engine[-1]), **overrides)}


def deepspeed_config(stage: int, **overrides: Any) -> dict[str, Any]:
    """Return a config of DeepSpeed; `zero` overrides its `zero_optimization`."""
    zero: dict[str, Any] = {"stage": stage, **overrides.pop("zero", {})}
    if stage == 3:
        # Small enough that the parameters of the tiny model make several sub-groups.
        zero.setdefault("sub_group_size", 10_000)
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **overrides,
    }


def slow(*values: Any) -> Any:
    """Return parameters of a test that only the slow suite runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": dict.fromkeys(("warmup_num_steps", "total_num_steps", "warmup_max_lr"), "auto"),
}
VARIANTS: dict[str, dict[str, Any]] = {  # of DeepSpeed's config, and of the training arguments
    "as it is": {},
    "optimizer offload": {"config": {"zero": {"offload_optimizer": {"device": "cpu"}}}},
    "scheduler of the config": {"config": {"scheduler": SCHEDULER}},
    "accumulation": {"gradient_accumulation_steps": 3},
    "bf16": {"bf16": True, "config": {"bf16": {"enabled": True}}},
}


def allow_fsdp_on_cpu() -> None:
    """Let Accelerate choose FSDP in this process, which upgrades only GPU types to it.

    It would silently run DDP.
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

    accelerate.state.AcceleratorState.__init__ = init


def check_engine(trainer: Any, engine: str) -> None:
    """Check that the engine is really on, over all ranks."""
    wrapped = trainer.model_wrapped
    assert trainer.args.world_size == dist.get_world_size()
    assert trainer.accelerator.is_fsdp2 == (engine == "fsdp2")
    if engine == "ddp":
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    elif engine == "fsdp2":
        assert all(isinstance(p, DTensor) for p in wrapped.parameters())
    else:
        from deepspeed.runtime.engine import DeepSpeedEngine

        assert isinstance(wrapped, DeepSpeedEngine)
        assert wrapped.zero_optimization_stage() == int(engine[-1])


def whole(trainer: Any) -> torch.Tensor:
    """Return every parameter, gathered; all ranks take part."""
    parameters = list(trainer.model.parameters())
    if trainer.is_deepspeed_enabled:
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return torch.cat([p.detach().reshape(-1).float().clone() for p in parameters])
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    return torch.cat([p.detach().reshape(-1).float().clone() for p in full])


@dataclass(frozen=True)
class End:
    """How a run ended on a rank.

    Attributes:
        world: number of ranks.
        precision: of the forward pass, as Accelerate names it.
        parameters: all of them, gathered.
        history: what Trainer logged of its steps.
        scheduled: steps of the scheduler.
        logs: of the controller; None of a stock Trainer.
        steps: of the optimizer, as the controller counts them.
        skipped: steps that the controller did not count.
        seen: by the watch.
    """

    world: int
    precision: str
    parameters: torch.Tensor
    history: list[dict[str, Any]]
    scheduled: int
    logs: Any
    steps: int
    skipped: int
    seen: list[Any]

    @classmethod
    def of(cls, trainer: Any, seen: list[Any]) -> "End":
        aees = getattr(trainer, "aees", None)
        return cls(
            world=trainer.args.world_size,
            precision=trainer.accelerator.mixed_precision,
            parameters=whole(trainer),
            history=[entry for entry in trainer.state.log_history if "loss" in entry],
            scheduled=getattr(trainer.lr_scheduler, "last_epoch", -1),
            logs=aees and aees.get_logs(),
            steps=aees.optimizer_steps if aees else 0,
            skipped=aees.skipped_steps if aees else 0,
            seen=seen,
        )


def lrs(end: End) -> list[float]:
    """Return the learning rates of the scheduler, as Trainer logged them."""
    return [entry["learning_rate"] for entry in end.history]


def assert_ranks_agree(ends: list[End], ranks: int) -> End:
    """Return how the first rank ended, as all others did, with parameters that are finite."""
    first = ends[0]
    assert len(ends) == first.world == ranks
    assert bool(torch.isfinite(first.parameters).all())
    for other in ends[1:]:
        assert other.logs == first.logs
        assert (other.steps, other.skipped) == (first.steps, first.skipped)
        assert other.scheduled == first.scheduled
        assert torch.equal(other.parameters, first.parameters)
    return first
