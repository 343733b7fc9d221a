"""The episodes of a run: opened, counted and closed on all ranks alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from pulseopt_hf.aees import Arm, Controller, EpisodeRecord, Selection
from pulseopt_hf.aees.json_checks import (
    StateDict,
    StateError,
    anything,
    field,
    integer,
    list_of,
    number,
)
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.divergence import DivergenceGuard
from pulseopt_hf.optim.hooks import ArmHooks
from pulseopt_hf.optim.losses import LossBuffer


class Episodes:
    """Feeds a `Controller` with step losses, averaged over ranks.

    The device is read, and other ranks are heard, when an episode ends and where the divergence
    guard looks.

    Args:
        config: the knobs; `episode_length` is set.
        agreement: how ranks agree.
        hooks: what runs the steps under the arms, and measures them.
        guard: ends episodes that ruin the model, if given.
    """

    def __init__(
        self,
        config: PulseOptConfig,
        agreement: Agreement,
        hooks: ArmHooks,
        guard: DivergenceGuard | None = None,
    ) -> None:
        assert config.episode_length is not None
        self.controller = Controller(config)
        self._config = config
        self._length = config.episode_length
        self._agreement = agreement
        self._hooks = hooks
        self._guard = guard
        self._losses = LossBuffer()
        self._last_step = 0  # global step of the last optimizer step that counted

    @property
    def is_open(self) -> bool:
        """Whether an episode is open."""
        return self.controller.episode is not None

    def begin_step(self, step: int, lr_room: Callable[[], tuple[float, float]]) -> Arm:
        """Return the arm of global step `step`, which rank 0 chooses where an episode begins.

        Args:
            step: the global step.
            lr_room: called where an episode begins; returns the base LR as a share of its peak, and
                the highest share that an arm may reach.
        """
        if self.controller.episode is not None:
            if self._guard is not None:
                self._guard.go_on()
            return self.controller.episode.arm
        choice = self.controller.choose(*lr_room())
        lr_index, noise_index, noise_seed = self._agreement.from_rank_0(
            [choice.lr_index, choice.noise_index, self._hooks.noise.seed]
        )
        self._hooks.noise.reseed(noise_seed)
        if self._guard is not None:
            self._guard.begin()
        return self.controller.open(Selection(lr_index, noise_index, choice.context), step)

    def count(self, loss: float | Tensor, step: int) -> EpisodeRecord | None:
        """Count an optimizer step, which happened in global step `step`.

        Args:
            loss: its step loss, shape ().
            step: its global step.

        Returns:
            The episode's record if this was its last step.
        """
        self._losses.append(loss)
        self._last_step = step
        steps, guard = len(self._losses), self._guard
        looks = guard is not None and guard.looks(steps, self._length)
        if looks or steps >= self._length:
            self.agree(step)
        if guard is not None and looks and self._has_diverged(guard):
            return self._close(step, guard.undo())
        # Fewer are left where a loss was not finite although its step was sound.
        return self._close(step) if len(self._losses) >= self._length else None

    def cut(self, step: int) -> EpisodeRecord | None:
        """Close the open episode as diverged before global step `step`, where a guard is kept."""
        if self._guard is None or not self.is_open:
            return None
        self.agree(step)
        return self._close(step, self._guard.undo())

    def finish(self, step: int) -> EpisodeRecord | None:
        """Close an episode that was only begun, if it has any losses."""
        if not self.is_open:
            return None
        self.agree(step)
        return self._close(self._last_step) if self._losses.agreed else None

    def agree(self, step: int) -> None:
        """Average the losses seen so far over ranks; every rank must call it.

        Raises:
            ValueError: one is not finite and `nonfinite` is `raise`.
        """
        new = self._losses.agree(self._agreement)
        bad = [loss for loss in new if not math.isfinite(loss)]
        if bad:
            if self._config.nonfinite == "raise":
                raise ValueError(f"`loss` must be finite, got {bad[0]} before global step {step}.")
            self._losses.restore(filter(math.isfinite, self._losses.agreed))

    def save(self, path: Path) -> None:
        """Write the start of the open episode, where a guard keeps it."""
        if self._guard is not None and self.is_open:
            self._guard.save(path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote, after `resumed`.

        Raises:
            StateError: the file is damaged or another model's.
        """
        if self._guard is not None and self.is_open:
            self._guard.load(path)

    def state_dict(self) -> StateDict:
        """Return everything that later arms depend on, as JSON; `agree` comes before it."""
        return {
            "controller": self.controller.state_dict(),
            "losses": list(self._losses.agreed),
            "last_step": self._last_step,
        }

    def resumed(self, state: object) -> Episodes:
        """Return the episodes that go on from `state_dict()`, in place of these.

        Raises:
            StateError: the state is damaged, of another version, or of other settings. These
                episodes are as they were.
        """
        losses = field(state, "losses", list_of(number))
        if len(losses) >= self._length:
            raise StateError(
                f"The open episode has {len(losses)} losses, and an episode {self._length}."
            )
        new = Episodes(self._config, self._agreement, self._hooks, self._guard)
        new._last_step = field(state, "last_step", integer)
        new.controller.load_state_dict(field(state, "controller", anything))
        if losses and not new.is_open:
            raise StateError(f"There are {len(losses)} losses, but no episode is open.")
        new._losses.restore(losses)
        return new

    def forget_start(self) -> None:
        """Let go of where an episode began, once others take its place."""
        if self._guard is not None:
            self._guard.forget()

    def _has_diverged(self, guard: DivergenceGuard) -> bool:
        losses = self._losses.agreed
        if not losses:
            return True
        sound = self.controller.sound_loss()
        return guard.has_diverged(losses, losses[0] if sound is None else sound)

    def _close(self, step: int, outcome: str | None = None) -> EpisodeRecord:
        # An episode of which no step was sound has no loss to show but the one before it.
        losses = self._losses.agreed or [self.controller.sound_loss() or 1.0]
        self._losses.clear()
        norm, learning_rate = self._hooks.mean_update_norm(), self._hooks.learning_rate
        return self.controller.close(losses, step, norm, outcome, learning_rate)
