"""The transient arm: an optimizer's own step hooks scale its LR and add noise, then restore it.

Schedulers, checkpoints and `get_last_lr()` only ever see the base LR, because the effective one
exists only between the optimizer's pre-step and post-step hook.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pulseopt_hf.aees import Arm
from pulseopt_hf.aees.json_checks import StateDict
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim.noise import GradientNoise
from pulseopt_hf.optim.unwrap import all_parameters
from pulseopt_hf.optim.update_norm import UpdateNorm


class StepOutcome:
    """What became of one call of `optimizer.step()`."""

    def __init__(self) -> None:
        """Start from nothing having happened."""
        self.fired = False
        self.parameters = 0  # that were stepped; engines call the optimizer once for each group
        self._found_inf: Tensor | None = None

    def mark(self, found_inf: Tensor | None) -> None:
        """Note that the optimizer was stepped, with the overflow flag it was given, if any."""
        self.fired = True
        self._found_inf = found_inf

    @property
    def happened(self) -> bool:
        """Whether the parameters were updated.

        `GradScaler` does not call a plain or foreach optimizer on overflow. A fused one it calls
        with `found_inf` set and the kernel leaves out the update, so there the flag is read: one
        device read, under a scaler only.
        """
        if not self.fired:
            return False
        return self._found_inf is None or not bool(self._found_inf.item())


class ArmHooks:
    """Runs the steps of a torch optimizer under an arm.

    The hooks do nothing outside `applied`, so steps that are not training steps stay plain.

    Args:
        optimizer: any `torch.optim.Optimizer` whose groups carry their LR as a number or tensor.
        config: the knobs.
        seed: of the gradient noise.
        shard: number of this rank's part, where an engine hands the optimizer parts of parameters
            that are not DTensors.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer`.
        ValueError: the optimizer has no LR to scale, or cannot be stepped without a closure, or
            its updates are to be measured and its parameters are sharded.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: PulseOptConfig,
        seed: int,
        shard: int = 0,
    ) -> None:
        check_optimizer(optimizer)
        self.noise = GradientNoise(seed, config.noise_mode)
        self._learning_rate: float | Tensor | None = None  # effective, in the last step
        self._update_norm: UpdateNorm | None = None
        if config.log_update_norm:
            self._update_norm = UpdateNorm(all_parameters(optimizer))
        self._shard = shard
        self._current: tuple[Arm, int, StepOutcome] | None = None
        self._lrs: Sequence[float] | None = None
        self._base: list[tuple[dict[str, Any], float | Tensor]] = []
        # A compiled `step` must not trace the hooks: it would compile again for every arm.
        untraced: Any = torch.compiler.disable
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(untraced(self._before_step)),
            optimizer.register_step_post_hook(untraced(self._after_step)),
        ]

    @contextmanager
    def applied(
        self, arm: Arm, step: int, lrs: Sequence[float] | None = None
    ) -> Iterator[StepOutcome]:
        """Apply `arm` to the optimizer steps taken inside; the LR is restored whatever happens.

        Args:
            arm: LR multiplier and noise level.
            step: number of optimizer steps taken before, which the noise is a function of.
            lrs: LR of each parameter group in a trial, instead of the base LR.

        Yields:
            The outcome, to be read once the step was called.
        """
        outcome = StepOutcome()
        self._current = (arm, step, outcome)
        self._lrs = lrs
        try:
            yield outcome
        finally:
            self._current = None
            self._restore()

    def take(self, step: Callable[[], object], arm: Arm, number: int) -> bool:
        """Call `step`, which steps the optimizer, under an arm.

        Args:
            step: called once.
            arm: LR multiplier and noise level.
            number: number of optimizer steps taken before.

        Returns:
            Whether the parameters were updated.
        """
        if self._update_norm is not None:
            self._update_norm.before_step()
        with self.applied(arm, number) as outcome:
            step()
        happened = outcome.happened
        if happened and self._update_norm is not None:
            self._update_norm.after_step()
        return happened

    @property
    def learning_rate(self) -> float | None:
        """Effective LR of the first parameter group in the last step, or `None` before it.

        Reads the device where the LR is a tensor.
        """
        return None if self._learning_rate is None else float(self._learning_rate)

    def mean_update_norm(self) -> float | None:
        """Return the mean update norm since the last call, or `None` where none was measured."""
        return None if self._update_norm is None else self._update_norm.mean()

    def state_dict(self) -> StateDict:
        """Return what later steps depend on, and what was measured of the latest, as JSON."""
        return {
            "noise_seed": self.noise.seed,
            "learning_rate": self.learning_rate,
            "update_norms": [] if self._update_norm is None else self._update_norm.state(),
        }

    def restore(
        self, noise_seed: int, learning_rate: float | None, update_norms: Sequence[float | None]
    ) -> None:
        """Go on where a saved run was."""
        self.noise.reseed(noise_seed)
        self._learning_rate = learning_rate
        if self._update_norm is not None:
            self._update_norm.restore(update_norms)

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._current is None:
            return
        arm, step, outcome = self._current
        # `GradScaler` sets both for the duration of a fused step; see StepOutcome.happened.
        outcome.mark(getattr(optimizer, "found_inf", None))
        if arm.noise_std > 0.0:
            grad_scale = getattr(optimizer, "grad_scale", None)
            outcome.parameters = self.noise.add(
                all_parameters(optimizer),
                arm.noise_std,
                step,
                grad_scale,
                shard=self._shard,
                first_index=outcome.parameters,
            )
        self._scale(optimizer, arm.lr_multiplier)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._current is not None:
            self._restore()

    def _scale(self, optimizer: torch.optim.Optimizer, multiplier: float) -> None:
        bases = self._lrs
        first = optimizer.param_groups[0]["lr"] if bases is None else bases[0]
        # An LR tensor is what schedulers change in place, so what is kept for the logs is a copy.
        self._learning_rate = first * multiplier
        if multiplier == 1.0 and bases is None:
            return
        seen: set[int] = set()
        for index, group in enumerate(optimizer.param_groups):
            base = group["lr"]
            if isinstance(base, Tensor):
                # Compiled and capturable optimizers hold on to the tensor: change it in place.
                # Groups may share one, which must not be scaled twice.
                if id(base) in seen:
                    continue
                seen.add(id(base))
                self._base.append((group, base.clone()))
                if bases is not None:
                    base.fill_(bases[index])
                base.mul_(multiplier)
            else:
                self._base.append((group, base))
                group["lr"] = (base if bases is None else bases[index]) * multiplier

    def _restore(self) -> None:
        for group, base in self._base:
            if isinstance(base, Tensor):
                group["lr"].copy_(base)
            else:
                group["lr"] = base
        self._base.clear()


def check_optimizer(optimizer: object) -> None:
    """Raise the one clear error where an optimizer cannot run under an arm; see `ArmHooks`."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}."
        )
    name = type(optimizer).__name__
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"{name} computes its own learning rate (`lr` is None), so there is none to multiply. "
            "Give it one; for Adafactor write `Adafactor(..., lr=1e-3, relative_step=False)`."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{name}.step needs a closure that computes the loss several times a step, so a step "
            "has no one loss and no one gradient. Use an optimizer that steps without a closure."
        )
