"""Calibration round a torch optimizer: trials within optimizer steps, the base LR, and the net."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pulseopt_hf.aees import Arm
from pulseopt_hf.aees.calibration import (
    SHORT_RUN,
    Calibration,
    Outcome,
    Trial,
    finite_movement,
    outcome_from_json,
)
from pulseopt_hf.aees.json_checks import (
    StateDict,
    StateError,
    field,
    flag,
    list_of,
    number,
    text,
)
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import base_lr
from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.hooks import ArmHooks
from pulseopt_hf.optim.later_steps import MOST_STEPS, later_steps
from pulseopt_hf.optim.loss_watch import LossWatch
from pulseopt_hf.optim.newness import newness_of
from pulseopt_hf.optim.probe import Probe
from pulseopt_hf.optim.scalars import norm
from pulseopt_hf.optim.snapshot import Snapshot
from pulseopt_hf.optim.unwrap import (
    has_scaler,
    innermost,
    is_stepped_by_deepspeed,
    stepped_parameters,
)

logger = logging.getLogger("pulseopt_hf.calibration")

_PHASES = ("searching", "watching", "done")


class StepFate(Enum):
    """What the trials of an optimizer step leave of it."""

    READY = "the search is over and the gradient untouched: take the step"
    USED = "the batch went into the trials"
    SKIPPED = "the step did not happen, as a gradient scaler decided"


class Calibrator:
    """Takes the trials of a `Calibration`, makes its result the base LR, and watches over it.

    A trial is atomic: within one optimizer step the parameters move, are measured and are put back,
    whatever happens. Where stepping leaves the gradient as it was, one step has room for several.

    Then the LR rises to what was found, over a twentieth of the run, unless the schedule has a
    warm-up of its own. Meanwhile the origin is kept, as a net. If the loss then lies above where it
    began by more than its noise, or is not finite, everything goes back to the origin and the LR to
    what was set.

    Args:
        optimizer: the optimizer as the loop steps it.
        model: the model as the loop calls it.
        scheduler: the LR scheduler, if there is one.
        hooks: what runs a step at a LR of its own.
        agreement: how ranks agree.
        max_steps: optimizer steps of the run, or `None` where that is not known.
        passes: of the run over its data.
        only_ask: whether to leave the base LR as it is.

    Raises:
        ValueError: `max_steps` or `passes` is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        scheduler: Any,
        hooks: ArmHooks,
        agreement: Agreement,
        max_steps: int | None = None,
        passes: float = 1.0,
        *,
        only_ask: bool = False,
    ) -> None:
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1, got {max_steps!r}.")
        self._optimizer, self._scheduler = optimizer, scheduler
        self._hooks, self._agreement = hooks, agreement
        self._only_ask = only_ask
        self._set_lrs = base_lr.peaks(optimizer)
        # Of a step at an LR, how far it goes on average, against the first one at that LR.
        self._pace = later_steps(innermost(optimizer), max_steps or MOST_STEPS) or 1.0
        newness = newness_of(model, agreement)
        self.search = Calibration(max(self._set_lrs), new_layers=newness.layers)
        if newness.has_new_head:  # else the length of the run does not matter
            self.search = Calibration(max(self._set_lrs), passes, max_steps or SHORT_RUN)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.probe = Probe(model, agreement, device, newness.body)
        self._buffers = list(model.buffers())
        self._versions = [buffer._version for buffer in self._buffers]
        self._parameters = list(model.parameters()) if is_stepped_by_deepspeed(optimizer) else []
        self._origin = Snapshot(optimizer, parameters=self._parameters)
        self._is_new = False  # whether the optimizer had no state at the origin
        self._watch = LossWatch(innermost(optimizer), self._set_lrs, max_steps)
        self.outcomes: list[Outcome] = []  # the last one counts
        self.phase = "searching"
        self.probe.listen()

    @property
    def is_searching(self) -> bool:
        """Whether the next optimizer step is for trials."""
        return self.phase == "searching"

    @property
    def is_done(self) -> bool:
        """Whether all is over, so that arms may play."""
        return self.phase == "done"

    @property
    def ramp(self) -> float:
        """Factor on the base LR in the step that runs, while the LR rises to what was found."""
        return self._watch.ramp if self.phase == "watching" else 1.0

    @property
    def outcome(self) -> Outcome | None:
        """What came of it; `None` before the search has ended."""
        return self.outcomes[-1] if self.outcomes else None

    def run(self, step: Callable[[], object], global_step: int) -> StepFate:
        """Take trials in place of an optimizer step, whose gradients are there.

        Args:
            step: steps the optimizer.
            global_step: number of the step in the run.
        """
        if not self.probe.begin():
            self.give_up(
                "the model returns no logits, embedding or loss that could be measured, or is not "
                "called as a whole",
                global_step,
            )
            return StepFate.USED if self._only_ask else StepFate.READY
        state = innermost(self._optimizer).state
        if self._is_new:
            # To save an optimizer without a state, torch makes one up, by a step with gradients of
            # zero (`torch.distributed.checkpoint.state_dict`, for FSDP2).
            state.clear()
        if not self._origin.is_taken:
            self._is_new = not state
            self._origin.take()
        search, repeatable = self.search, True
        while repeatable and not search.is_done:
            happened, repeatable = self._try(step, global_step)
            if not happened:
                return StepFate.SKIPPED
            if search.batch_is_done:
                break
        self.probe.end_step()
        if search.is_done:
            self._finish(global_step)
        ready = search.is_done and repeatable and not self._only_ask
        return StepFate.READY if ready else StepFate.USED

    def observe(self, loss: float | Tensor | None, global_step: int) -> None:
        """End an optimizer step; may go back to the origin.

        Args:
            loss: its step loss, shape (), or `None` for a step that did not happen.
            global_step: number of the step in the run.
        """
        if self.phase == "searching" and loss is not None:
            self._watch.add_origin(loss)
        elif self.phase == "watching" and self._watch.add(loss):
            self._judge(global_step)

    def agree(self) -> None:
        """Average what was observed over ranks; every rank must call it."""
        self._watch.agree(self._agreement)

    def close(self) -> None:
        """Let go of the model, the hooks on it, and the copy."""
        self.probe.close()
        self._origin.discard()
        self._buffers, self._parameters = [], []

    def _try(self, step: Callable[[], object], global_step: int) -> tuple[bool, bool]:
        """Take one trial.

        Returns:
            Whether the step happened, and whether another can be taken on the same gradient.
        """
        search = self.search
        learning_rate = search.next_lr
        # A first step as long as later ones are at this LR.
        lrs = [lr * (self._pace * learning_rate / search.set_lr) for lr in self._set_lrs]
        repeatable = not (has_scaler(self._optimizer) or is_stepped_by_deepspeed(self._optimizer))
        before = self._gradient_norms() if repeatable else None
        try:
            base_lr.skip_warmup(self._optimizer)
            with self._hooks.applied(Arm.of(1.0, 0.0), 0, lrs) as outcome:
                step()
            if not outcome.happened:
                return False, False
            moved = self.probe.movement()
            weights = self._weight_movement()
        finally:
            self._origin.restore(buffers=False)
        own_batch = self.probe.is_own_batch
        search.add(Trial(learning_rate, moved, weights, own_batch, global_step))
        logger.info("Trial at LR %.3g: outputs moved %.3g, weights %.3g", *_shown(search.trials))
        if before is not None:  # some optimizers normalise gradients in place
            changed = not torch.equal(before, self._gradient_norms())
            repeatable = not self._agreement.any(changed)
        return True, repeatable

    def _weight_movement(self) -> float:
        moved, moving, size, sized = self._agreement.mean(self._origin.distance().unbind())
        if size == 0.0 or moving == 0.0:
            return 0.0
        mean_square = (moved / moving) / (size / sized)
        return finite_movement(math.sqrt(mean_square) if mean_square >= 0.0 else math.nan)

    def _gradient_norms(self) -> Tensor:
        gradients = [p.grad for p in stepped_parameters(self._optimizer) if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        dense = [g.coalesce().values() if g.is_sparse else g for g in local]
        norms = [norm(g) for g in dense]
        return torch.stack(norms) if norms else torch.zeros(0)

    def _finish(self, step: int) -> None:
        search, found = self.search, self.search.learning_rate
        if found is None:
            said = f"did not answer to it in {len(search.trials)} trials"
            if search.levels_off:
                said = "jumps in the smallest step, and hardly moves further in larger ones"
            self.give_up(f"what the model computes {said}", step)
            return
        limit, factor = search.limited_by, (search.factor, search.factor_for)
        outcome = Outcome(search.set_lr, found, limit, None, step, *factor)
        if self._only_ask:
            self.outcomes.append(outcome)
            self.phase = "done"
            return
        self.probe.close()
        # A net has to hold the buffers that forward passes move, such as running statistics; a
        # quantised model keeps weights in buffers, which stay where they are.
        pairs = zip(self._buffers, self._versions, strict=True)
        self._origin.add(buffer for buffer, version in pairs if buffer._version != version)
        base_lr.multiply(self._optimizer, self._scheduler, found / search.set_lr)
        self.phase = "watching"
        self._decide(outcome)

    def _judge(self, step: int) -> None:
        """Look whether the loss has risen, and take the net away."""
        self.agree()
        # A loop of one's own that was resumed amid the watch has no origin.
        if self._watch.has_risen and self._origin.is_taken:
            set_lr, used = self.search.set_lr, self.outcomes[-1].learning_rate
            self._origin.restore()
            base_lr.multiply(self._optimizer, self._scheduler, set_lr / used)
            self.give_up(
                f"at {used:.3g} the loss rose in {self._watch.steps} steps, so the run went back "
                "to where it began",
                step,
            )
        self.phase = "done"
        self.close()

    def give_up(self, reason: str, global_step: int) -> None:
        """End without an LR, and say why."""
        set_lr = self.search.set_lr
        self.phase = "done"
        self._decide(Outcome(set_lr, set_lr, None, reason, global_step))
        self.close()

    def _decide(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        if self._agreement.is_rank_0 and not self._only_ask:
            logger.warning("%s", outcome)

    def undo(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Set the LR that was set before, for another training with the same optimizer.

        Args:
            optimizer: that training's; another one, or one with another LR by now, is left alone.
            scheduler: its scheduler.
        """
        if self.outcome is None or innermost(optimizer) is not innermost(self._optimizer):
            return
        used, set_lr = self.outcome.learning_rate, self.search.set_lr
        if math.isclose(max(base_lr.peaks(optimizer)), used, rel_tol=1e-6):
            base_lr.multiply(optimizer, scheduler, set_lr / used)

    def state_dict(self) -> StateDict:
        """Return the search and what the net has seen, as JSON; `agree` comes before it."""
        return {
            **self.search.state_dict(),
            "phase": self.phase,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "is_new": self._is_new,
            "pace": self._pace,
            **self._watch.state_dict(),
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from `state_dict()`; nothing is changed if this raises.

        Raises:
            StateError: the state is damaged.
        """
        phase = field(state, "phase", text)
        if phase not in _PHASES:
            raise StateError(f"`phase` must be one of {', '.join(_PHASES)}, got {phase!r}.")
        outcomes = field(state, "outcomes", list_of(outcome_from_json))
        is_new = field(state, "is_new", flag)
        pace = field(state, "pace", number)
        if not 0.0 < pace <= 1.0:
            raise StateError(f"`pace` must be in (0, 1], got {pace}.")
        watch = copy.copy(self._watch)
        watch.load_state_dict(state)
        self.search.load_state_dict(state)
        self._watch = watch
        factor = self.search.set_lr / max(self._set_lrs)
        self._set_lrs = [lr * factor for lr in self._set_lrs]
        self.phase, self.outcomes, self._is_new, self._pace = phase, outcomes, is_new, pace
        if not self.is_searching:
            self.probe.close()

    def save(self, folder: Path, rank: int) -> None:
        """Write into a checkpoint what the state as JSON cannot hold."""
        keeper: Probe | Snapshot = self.probe if self.is_searching else self._origin
        try:
            if self.is_searching or self._origin.is_taken:
                keeper.save(folder / self._file(rank))
        except TypeError as error:
            logger.warning("A run resumed from %s starts its calibration anew: %s", folder, error)

    def load(self, folder: Path | None, rank: int) -> None:
        """Read what `save` wrote, after `load_state_dict`.

        Raises:
            StateError: the file is missing or damaged.
        """
        if self.is_done or (self.is_searching and not self.search.trials):
            return
        if folder is None:
            raise StateError(
                "A part of the calibration lies in the checkpoint's folder, which no event names. "
                "Resume in the run's own `output_dir`, or write "
                "`PulseOptCallback(config).attach(trainer)`."
            )
        keeper: Probe | Snapshot = self.probe if self.is_searching else self._origin
        keeper.load(folder / self._file(rank))

    def _file(self, rank: int) -> str:
        return f"pulse_{'calls' if self.is_searching else 'origin'}_{rank}.safetensors"


def why_not_calibrate(optimizer: torch.optim.Optimizer, config: PulseOptConfig) -> str | None:
    """Return what keeps an optimizer's LR from being calibrated, as far as it can be seen there."""
    if max(base_lr.peaks(optimizer)) <= 0.0:
        return "it is zero"
    if config.calibration == "auto" and base_lr.finds_its_own(optimizer):
        return f"{type(innermost(optimizer)).__name__} finds its own"
    if later_steps(innermost(optimizer)) is None:
        return f"the first steps of {type(innermost(optimizer)).__name__} are not like later ones"
    return None


def _shown(trials: Sequence[Trial]) -> tuple[float, float, float]:
    return trials[-1].learning_rate, trials[-1].movement, trials[-1].weight_movement
