"""DeepSpeed, whose engine steps the optimizer itself, within `training_step`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim.unwrap import all_parameters, innermost
from pulseopt_hf.trainer.patches import wrap


class DeepSpeedSteps:
    """Stands where a DeepSpeed engine steps, and tells whether the step happened.

    The engine calls the innermost optimizer once for each parameter group (ZeRO-3: sub-group), with
    this rank's flat part of the parameters and its gradient, which is averaged, unscaled and
    clipped by then. Between those calls and the scheduler of a DeepSpeed config, which steps right
    after them, there is no other place for an arm than the innermost optimizer's own hooks.

    The guard is here as well: where the engine does not check for overflow itself, the calls are
    left out and the engine is told that there was one.

    Args:
        engine: the `DeepSpeedEngine`.
        patches: what takes this out again after training.
        seam: called where the engine would step; it calls `run`.
    """

    def __init__(self, engine: Any, patches: ExitStack, seam: Callable[[], None]) -> None:
        self._engine = engine
        self._running = False
        self._finite: bool | None = None  # of the step that is running, once known
        self._plain_step = engine.step
        wrap(patches, engine, "step", lambda step: lambda *args, **kwargs: seam())
        wrap(patches, innermost(engine.optimizer), "step", self._guarded)

    def run(self) -> None:
        """Let the engine step."""
        if self._finite is False:
            # Those of the engine's optimizers that look for overflow reset this themselves.
            self._engine.optimizer.overflow = False
        self._finite = None
        self._running = True
        try:
            self._plain_step()
        finally:
            self._running = False

    def _guarded(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def step_if_finite(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                if self._finite is None:
                    self._finite = self._is_finite()
                if not self._finite:
                    # The engine asks this before it steps its scheduler, and Accelerate for ours.
                    self._engine.optimizer.overflow = True
                    return None
            return step(*args, **kwargs)

        return step_if_finite

    def _is_finite(self) -> bool:
        """Whether the gradients of all ranks are, by the norm that the engine has computed."""
        norm = getattr(self._engine.optimizer, "_global_grad_norm", None)
        if norm is None:  # ZeRO-0 without clipping: whole gradients, the same on all ranks
            parameters = all_parameters(innermost(self._engine.optimizer))
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        # DeepSpeed writes -1 for a norm that is not finite.
        return math.isfinite(norm) and float(norm) >= 0.0


def shard_number(engine: Any) -> int:
    """Number the part of the parameters that this rank updates; 0 where each updates them all."""
    partitioned = engine.zero_optimization_stage() > 0
    # Chosen for bf16 with float32 accumulation; parts the optimizer's state at any stage.
    partitioned |= type(engine.optimizer).__name__ == "BF16_Optimizer"
    return dist.get_rank() if partitioned and dist.is_initialized() else 0


def check_settings(deepspeed: dict[str, Any]) -> None:
    """Refuse what an arm would not reach.

    Args:
        deepspeed: the DeepSpeed config.

    Raises:
        ValueError: one or more settings cannot be adapted; the message has a line for each.
    """
    problems = list(_problems(deepspeed))
    if problems:
        raise ValueError("\n".join(problems))


def check_knobs(config: PulseOptConfig, engine: Any) -> None:
    """Refuse knobs that mean nothing for flat parts of parameters.

    Raises:
        ValueError: one of them is set.
    """
    noisy = any(level > 0.0 for level in config.noise_candidates)
    is_flat = engine.optimizer is not innermost(engine.optimizer)  # parts, not the parameters
    if noisy and config.noise_mode == "relative" and is_flat:
        raise ValueError(
            "`noise_mode` must be 'absolute' under DeepSpeed, got 'relative': ZeRO joins the "
            "gradients of all parameters into one, so that none has a size of its own. Write "
            "`noise_mode='absolute'`, or train with FSDP2."
        )
    if config.divergence == "rollback":
        raise ValueError(
            "`divergence` must be 'off' or 'cut' under DeepSpeed, got 'rollback': its engine keeps "
            "parameters and optimizer state where they cannot be put back."
        )
    if config.log_update_norm:
        raise ValueError(
            "`log_update_norm` needs whole parameters, and DeepSpeed steps flat parts of them. Set "
            "`log_update_norm` to False."
        )


def _problems(deepspeed: dict[str, Any]) -> Iterator[str]:
    zero = deepspeed.get("zero_optimization") or {}
    offload = zero.get("offload_optimizer") or {}
    if zero.get("zenflow"):
        yield (
            "DeepSpeed's `zenflow` updates parameters outside of the optimizer's step, where no "
            "arm reaches them. Remove `zero_optimization.zenflow`."
        )
    if offload.get("super_offload"):
        yield (
            "DeepSpeed's `super_offload` steps in a process of its own, where no arm reaches it. "
            "Set `zero_optimization.offload_optimizer.super_offload` to false."
        )
    if float(offload.get("ratio", 1.0)) < 1.0:
        yield (
            "`zero_optimization.offload_optimizer.ratio` must be 1, got "
            f"{offload['ratio']}: the rest is stepped by a second optimizer."
        )
    if int(zero.get("mics_shard_size", -1)) > 0:
        yield (
            "`zero_optimization.mics_shard_size` must be unset, got "
            f"{zero['mics_shard_size']}: the noise of replicated parts would not agree."
        )
    tensor_parallel = (deepspeed.get("tensor_parallel") or {}).get("autotp_size", 0)
    if tensor_parallel != "auto" and int(tensor_parallel) > 1:
        yield (
            f"`tensor_parallel.autotp_size` must be at most 1, got {tensor_parallel}: the noise "
            "of replicated parameters would not agree."
        )
    kind = str((deepspeed.get("optimizer") or {}).get("type", ""))
    if kind.lower() in ("onebitadam", "zerooneadam", "onebitlamb"):
        yield (
            f"DeepSpeed's `{kind}` averages gradients inside its own step, after the noise and "
            "past the guard. Choose an optimizer such as `AdamW`."
        )
