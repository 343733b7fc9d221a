"""Optimizer steps under arms and trials: the engine under `AEES` and the Trainer floor."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pulseopt_hf.aees import Arm, Controller, EpisodeRecord
from pulseopt_hf.aees.json_checks import (
    StateDict,
    anything,
    field,
    integer,
    list_of,
    number,
    optional,
)
from pulseopt_hf.aees.record_format import NumberedEpisode, NumberedTrial, RunEvent
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.base_lr import peaks, share_of_peak
from pulseopt_hf.optim.calibrator import Calibrator, StepFate
from pulseopt_hf.optim.divergence import SKIPS, DivergenceGuard
from pulseopt_hf.optim.episodes import Episodes
from pulseopt_hf.optim.hooks import ArmHooks
from pulseopt_hf.optim.unwrap import device_of, has_scaler, innermost


class EpisodicSteps:
    """Takes the steps of an optimizer under arms, after trials where there is a calibration.

    A loop calls `step_start`, then `apply` where it would step the optimizer and `settle` once the
    loss of the step is known. `AEES` does both in its `step_end`.

    Args:
        optimizer: the optimizer, wrapped by Accelerate or not.
        config: the knobs; `episode_length` is set.
        distributed: whether ranks agree, where `torch.distributed` runs.
        shard: see `ArmHooks`.
        scales_loss: whether an engine scales the loss, which ordinarily overflows now and then.
        buffers: the model's, which a rollback has to put back too.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
        ValueError: the optimizer cannot run under an arm, or the episode length is not set.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: PulseOptConfig,
        *,
        distributed: bool = True,
        shard: int = 0,
        scales_loss: bool = False,
        buffers: Iterable[Tensor] = (),
    ) -> None:
        if config.episode_length is None:
            raise ValueError(
                "`episode_length` must be a whole number >= 1 here, got None: a loop of one's own "
                "has no length that it could follow from."
            )
        self.optimizer = optimizer
        self.config = config
        self.episode_length: int = config.episode_length
        self.current_candidate: Arm | None = None
        self.calibrator: Calibrator | None = None
        self.listeners: list[Callable[[RunEvent], object]] = []
        self.ramp = 1.0  # of the last step, while the LR rises to what a calibration found
        self.optimizer_steps = 0  # that happened; the noise is a function of it
        self.skipped_steps = 0
        self._consecutive_skips = 0
        self._told = 0  # of what the calibration has to tell
        self._global_step = 0  # of the step that is open
        self.step_happened = False  # the open step, as far as `apply` has run
        inner = innermost(optimizer)
        seed = secrets.randbits(32) if config.seed is None else config.seed
        self._hooks = ArmHooks(inner, config, seed, shard)
        self._agreement = Agreement(device_of(inner), enabled=distributed)
        self._scales_loss = scales_loss or has_scaler(optimizer)
        guard = None if config.divergence == "off" else DivergenceGuard(inner, config, buffers)
        self._episodes = Episodes(config, self._agreement, self._hooks, guard)

    def calibrate(
        self,
        model: nn.Module,
        scheduler: Any,
        max_steps: int | None = None,
        passes: float = 1.0,
        *,
        only_ask: bool = False,
    ) -> Calibrator:
        """Begin a calibration in the next optimizer step, before any episode; see `Calibrator`."""
        self.calibrator = Calibrator(
            self.optimizer,
            model,
            scheduler,
            self._hooks,
            self._agreement,
            max_steps,
            passes,
            only_ask=only_ask,
        )
        return self.calibrator

    @property
    def is_calibrating(self) -> bool:
        """Whether episodes wait for a calibration to end."""
        return self.calibrator is not None and not self.calibrator.is_done

    @property
    def is_plain(self) -> bool:
        """Whether every step is the optimizer's own: there is no arm to play, nothing was tried."""
        return self.controller.is_neutral and self.calibrator is None

    @property
    def controller(self) -> Controller:
        """What chooses the arms and records the episodes."""
        return self._episodes.controller

    def step_start(self, global_step: int) -> Arm:
        """Begin an optimizer step or one of its micro-batches; open an episode if none is open.

        Args:
            global_step: number of the step in the run, >= 0; only the record uses it.

        Returns:
            The arm of the step; it is also `current_candidate` until `step_end`.

        Raises:
            ValueError: `global_step` is not a whole number >= 0.
            RuntimeError: the previous step was not ended.
        """
        if isinstance(global_step, bool) or not isinstance(global_step, int) or global_step < 0:
            raise ValueError(f"`global_step` must be a whole number >= 0, got {global_step!r}.")
        if self.current_candidate is not None:
            raise RuntimeError("`step_start` was called twice; end the open step with `step_end`.")
        self._global_step = global_step
        if self.calibrator is not None and self.is_calibrating:
            arm = Arm.of(self.calibrator.ramp, 0.0)
        else:
            arm = self._episodes.begin_step(global_step, self._lr_room)
        self.current_candidate = arm
        return arm

    def _lr_room(self) -> tuple[float, float]:
        outcome = None if self.calibrator is None else self.calibrator.outcome
        found = outcome is not None and outcome.reason is None
        return share_of_peak(self.optimizer), 1.0 if found else math.inf

    def finalize(self) -> None:
        """Close a partial episode. Safe to call again; a later `step_start` opens a new one."""
        self.abandon()
        self._tell(self._episodes.finish(self._global_step))

    def apply(self, step: Callable[[], object], is_finite: bool = True) -> bool:
        """Run `step`, which steps the optimizer, under the open step's arm.

        Part of `step_end`, for loops that step the optimizer themselves; followed by `settle`.

        Args:
            step: left out if the step is not finite, unless a gradient scaler has to be stepped to
                skip: it finds the overflow and lowers its scale.
            is_finite: whether loss and gradients are, on all ranks alike.

        Returns:
            Whether the step happened, be it for trials.
        """
        arm = self._require_open_step()
        self.step_happened = (is_finite or has_scaler(self.optimizer)) and self._take(step, arm)
        return self.step_happened

    def _take(self, step: Callable[[], object], arm: Arm) -> bool:
        if self.calibrator is not None and self.calibrator.is_searching:
            fate = self.calibrator.run(step, self._global_step)
            if fate is not StepFate.READY:
                return fate is StepFate.USED
            arm = Arm.of(self.calibrator.ramp, 0.0)
        self.ramp = arm.lr_multiplier if self.is_calibrating else 1.0
        return self._hooks.take(step, arm, self.optimizer_steps)

    def settle(self, loss: float | Tensor | None) -> None:
        """End the open step: count it, or skip it where `apply` found that it did not happen.

        Reads the device once an episode. The episode neither counts nor sees a skipped step.

        Args:
            loss: its step loss, shape (); a step without one is not counted.

        Raises:
            RuntimeError: `max_consecutive_skips` steps in a row were skipped.
            ValueError: the step was not finite and `nonfinite` is `raise`.
        """
        self._require_open_step()
        happened = self.step_happened
        self.abandon()
        if happened:
            self._count(loss)
        else:
            self._skip(loss)

    def _count(self, loss: float | Tensor | None) -> None:
        if loss is None:
            return
        self.optimizer_steps += 1
        self._consecutive_skips = 0
        record = None
        if self.calibrator is not None and self.is_calibrating:
            self.calibrator.observe(loss, self._global_step)
        elif self._episodes.is_open:  # the step in which a calibration ended belongs to none
            record = self._episodes.count(loss, self._global_step)
        self._tell(record)

    def _skip(self, loss: float | Tensor | None) -> None:
        if self.config.nonfinite == "raise" and not self._overflows(loss):
            raise ValueError(
                f"The loss or a gradient is not finite at {self._where()}; the step's loss is "
                f"{'unknown' if loss is None else float(loss)}."
            )
        self.skipped_steps += 1
        self._consecutive_skips += 1
        record = None
        if self.calibrator is not None:
            self.calibrator.observe(None, self._global_step)
        # A gradient scaler looks for its scale by skipping; that says nothing about the arm.
        if self._consecutive_skips % SKIPS == 0 and not self._scales_loss:
            record = self._episodes.cut(self._global_step)
        self._tell(record)
        if self._consecutive_skips >= self.config.max_consecutive_skips:
            raise RuntimeError(
                f"{self._consecutive_skips} optimizer steps in a row were skipped because of "
                f"non-finite losses or gradients, the last at {self._where()}. Lower the learning "
                "rate or look into the data; `max_consecutive_skips` sets how many are tolerated."
            )

    def _overflows(self, loss: float | Tensor | None) -> bool:
        """Whether a skip is a gradient scaler's ordinary overflow: all ranks' losses are finite."""
        # One rank alone must not raise: the others would wait for it.
        bad = loss is not None and not math.isfinite(float(loss))
        return self._scales_loss and not self._agreement.any(bad)

    def give_up_calibration(self, reason: str) -> None:
        """End a calibration that cannot go on, and say why; nothing where none is under way."""
        if self.calibrator is not None and self.is_calibrating:
            self.calibrator.give_up(reason, self._global_step)
            self._tell(None)

    def events(self) -> Iterator[RunEvent]:
        """Yield all that listeners were told, or would have been, since the run began."""
        yield from self._calibration_events()
        for count, record in self.controller.since(0):
            yield NumberedEpisode(count, record)

    def _tell(self, record: EpisodeRecord | None) -> None:
        """Tell the listeners what came of a step: trials, an outcome, the end of an episode."""
        events: list[RunEvent] = []
        calibrator = self.calibrator
        if calibrator is not None:
            if self._told < len(calibrator.search.trials) + len(calibrator.outcomes):
                events += self._calibration_events()[self._told :]
                self._told += len(events)
        if record is not None:
            events.append(NumberedEpisode(self.controller.closed, record))
        for event in events:
            for listener in self.listeners:
                listener(event)

    def _calibration_events(self) -> list[RunEvent]:
        """Return the trials, and after them the outcomes: no trial comes after one."""
        if self.calibrator is None:
            return []
        trials = enumerate(self.calibrator.search.trials, 1)
        return [*(NumberedTrial(*trial) for trial in trials), *self.calibrator.outcomes]

    def abandon(self) -> None:
        """Forget the open step, which will not be taken, or not be counted."""
        self.current_candidate = None
        self.step_happened = False

    def agree(self) -> None:
        """Average what this episode has seen so far over ranks; every rank must call it.

        Afterwards one rank alone can ask for `agreed_state`.
        """
        self._episodes.agree(self._global_step)
        if self.calibrator is not None:
            self.calibrator.agree()

    @property
    def learning_rate(self) -> float | None:
        """Effective LR of the first parameter group in the last step; `None` before any step.

        Reads the device if the LR is a tensor.
        """
        return self._hooks.learning_rate

    @property
    def set_lr(self) -> float:
        """The highest base LR of the schedule, as it was set before any calibration."""
        if self.calibrator is not None:
            return self.calibrator.search.set_lr
        return max(peaks(self.optimizer))

    def remove(self) -> None:
        """Take all hooks and listeners off, for another controller to put on its own."""
        self.listeners.clear()
        self._hooks.remove()
        if self.calibrator is not None:
            self.calibrator.close()

    def save_files(self, folder: Path, rank: int) -> None:
        """Write into a checkpoint what `state_dict` cannot hold; every rank takes part."""
        if self.calibrator is not None and self.is_calibrating:
            self.calibrator.save(folder, rank)
        self._episodes.save(folder / _episode_file(rank))

    def load_files(self, folder: Path | None, rank: int) -> None:
        """Read what `save_files` wrote, after `load_state_dict`.

        Raises:
            StateError: a file is missing, damaged or another model's, or the folder not known.
        """
        if self.calibrator is not None:
            self.calibrator.load(folder, rank)
        if folder is not None:
            self._episodes.load(folder / _episode_file(rank))

    def state_dict(self) -> StateDict:
        """Return all that later arms depend on, as JSON, also in the middle of an episode.

        Under `torch.distributed` every rank must call it.
        """
        self.agree()
        return self.agreed_state()

    def agreed_state(self) -> StateDict:
        """Return `state_dict` with what ranks have agreed on so far. Sends nothing."""
        calibration = None if self.calibrator is None else self.calibrator.state_dict()
        return {
            **self._episodes.state_dict(),
            "calibration": calibration,
            "optimizer_steps": self.optimizer_steps,
            "skipped_steps": self.skipped_steps,
            "consecutive_skips": self._consecutive_skips,
            **self._hooks.state_dict(),
        }

    def load_state_dict(self, state: object) -> None:
        """Continue from `state_dict()`; nothing is changed if this raises.

        Raises:
            StateError: the state is damaged, or of another version, or of other settings. The
                message names settings that differ, with both values.
        """
        steps = field(state, "optimizer_steps", integer)
        skipped = field(state, "skipped_steps", integer)
        consecutive = field(state, "consecutive_skips", integer)
        noise_seed = field(state, "noise_seed", integer)
        learning_rate = field(state, "learning_rate", optional(number))
        update_norms = field(state, "update_norms", list_of(optional(number)))
        calibration = field(state, "calibration", anything)
        episodes = self._episodes.resumed(state)
        if self.calibrator is not None and calibration is not None:
            self.calibrator.load_state_dict(calibration)
            self._told = len(self._calibration_events())
        elif self.calibrator is not None:  # what was begun without is not calibrated midway
            self.calibrator.close()
            self.calibrator = None
        self.abandon()
        episodes.forget_start()
        self._episodes = episodes
        self._hooks.restore(noise_seed, learning_rate, update_norms)
        self.optimizer_steps = steps
        self.skipped_steps = skipped
        self._consecutive_skips = consecutive

    def _require_open_step(self) -> Arm:
        if self.current_candidate is None:
            raise RuntimeError("No step is open; call `step_start` before `step_end`.")
        return self.current_candidate

    def _where(self) -> str:
        return f"global step {self._global_step}"


def _episode_file(rank: int) -> str:
    return f"pulse_episode_{rank}.safetensors"
