"""The episodes of a run: opened, counted and closed on all ranks alike."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from pulseopt_hf.aees import Controller, EpisodeRecord, Selection
from pulseopt_hf.aees.state import StateDict, StateError, field, integer, list_of, number
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.divergence import DivergenceGuard
from pulseopt_hf.optim.losses import LossBuffer
from pulseopt_hf.optim.update_norm import UpdateNorm


class Episodes:
    """Feeds a `Controller` with step losses, averaged over ranks.

    The device is read, and other ranks are heard, when an episode ends and where the divergence
    guard looks.

    Args:
        config: the knobs; `episode_length` is set.
        agreement: how ranks agree.
        guard: ends episodes that ruin the model, if given.
        update_norm: measures updates, if given.
        learning_rate: reads the effective LR of the last step, for the record.
        lr_share: reads the base LR as a share of its peak.
    """

    def __init__(
        self,
        config: PulseOptConfig,
        agreement: Agreement,
        guard: DivergenceGuard | None = None,
        update_norm: UpdateNorm | None = None,
        learning_rate: Callable[[], float | None] = lambda: None,
        lr_share: Callable[[], float] = lambda: 1.0,
    ) -> None:
        assert config.episode_length is not None
        self.controller = Controller(config)
        self.guard = guard
        self._config = config
        self._length = config.episode_length
        self._agreement = agreement
        self._update_norm = update_norm
        self._learning_rate = learning_rate
        self._lr_share = lr_share
        self._losses = LossBuffer()
        self._last_step = 0  # global step of the last optimizer step that counted

    @property
    def is_open(self) -> bool:
        """Whether an episode is open."""
        return self.controller.episode is not None

    def open(self, step: int, noise_seed: int, *, calibrated: bool = False) -> int:
        """Begin an episode at global step `step`, with the arm that rank 0 chooses.

        Args:
            step: its first global step.
            noise_seed: of this rank.
            calibrated: whether the peak of the base LR is the highest that is known to be safe.

        Returns:
            Rank 0's noise seed.
        """
        choice = self.controller.choose(self._lr_share(), 1.0 if calibrated else math.inf)
        lr_index, noise_index, noise_seed = self._agreement.from_rank_0(
            [choice.lr_index, choice.noise_index, noise_seed]
        )
        self.controller.open(Selection(lr_index, noise_index, choice.context), step)
        if self.guard is not None:
            self.guard.begin()
        return noise_seed

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
        guard = self.guard
        if guard is not None and guard.looks(len(self._losses), self._length):
            self.agree(step)
            if self._has_diverged(guard):
                return self._close_diverged(guard, step)
        if len(self._losses) < self._length:
            return None
        self.agree(step)
        # Fewer are left where a loss was not finite although its step was sound.
        if len(self._losses) < self._length:
            return None
        return self._close()

    def cut(self, step: int) -> None:
        """Close the open episode as diverged before global step `step`, where a guard is kept."""
        if self.guard is not None and self.is_open:
            self.agree(step)
            self._close_diverged(self.guard, step)

    def finish(self, step: int) -> None:
        """Close an episode that was only begun, if it has any losses."""
        if self.is_open:
            self.agree(step)
            if self._losses.agreed:
                self._close()

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
            self._losses.agreed = [loss for loss in self._losses.agreed if math.isfinite(loss)]

    def state_dict(self) -> StateDict:
        """Return everything that later arms depend on, as JSON; `agree` comes before it."""
        return {
            "controller": self.controller.state_dict(),
            "losses": list(self._losses.agreed),
            "last_step": self._last_step,
        }

    def prepare(self, state: object) -> Callable[[], None]:
        """Check what `state_dict()` returned, and return what continues from it.

        Raises:
            StateError: the state is damaged, of another version, or of other settings.
        """
        losses = field(state, "losses", list_of(number))
        last_step = field(state, "last_step", integer)
        if len(losses) >= self._length:
            raise StateError(
                f"The open episode has {len(losses)} losses, and an episode {self._length}."
            )
        controller = Controller(self._config)
        controller.load_state_dict(field(state, "controller", lambda value, name: value))
        if losses and controller.episode is None:
            raise StateError(f"There are {len(losses)} losses, but no episode is open.")

        def go_on() -> None:
            self.controller = controller
            self._last_step = last_step
            self._losses.clear()
            self._losses.agreed = losses
            if self.guard is not None and self.is_open:
                self.guard.load(None)

        return go_on

    def _has_diverged(self, guard: DivergenceGuard) -> bool:
        losses = self._losses.agreed
        if not losses:
            return True
        sound = self.controller.sound_loss()
        return guard.has_diverged(losses, losses[0] if sound is None else sound)

    def _close(self) -> EpisodeRecord:
        losses = self._losses.agreed
        self._losses.clear()
        return self.controller.close(
            losses, self._last_step, self._mean_norm(), learning_rate=self._learning_rate()
        )

    def _close_diverged(self, guard: DivergenceGuard, step: int) -> EpisodeRecord:
        outcome = guard.undo()
        # An episode of which no step was sound has no loss to show but the one before it.
        losses = self._losses.agreed or [self.controller.sound_loss() or 1.0]
        self._losses.clear()
        rate = self._learning_rate()
        return self.controller.close(losses, step, self._mean_norm(), outcome, rate)

    def _mean_norm(self) -> float | None:
        return self._update_norm.mean() if self._update_norm is not None else None
