"""The divergence guard: an episode that ruins the model is cut short and, if asked for, undone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim.snapshot import Snapshot

logger = logging.getLogger("pulseopt_hf")

FIRST_LOOK = 4  # optimizer steps of an episode
SKIPS = 3  # steps skipped in a row that count as an episode turned non-finite
CUT, ROLLED_BACK = "cut", "rolled back"


class DivergenceGuard:
    """Decides whether an episode has diverged, and takes it back.

    It looks at the losses after 4, 8, 16, ... steps and at the end of an episode, so that the
    device is read a few times an episode and not at every step.

    Args:
        optimizer: the optimizer, wrapped by Accelerate or not.
        config: the knobs; `divergence` is not `off`.
        buffers: see `Snapshot`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: PulseOptConfig,
        buffers: Iterable[Tensor] = (),
    ) -> None:
        self._factor = config.divergence_factor
        self._snapshot = Snapshot(optimizer, buffers) if config.divergence == "rollback" else None

    def begin(self) -> None:
        """Note the start of an episode."""
        if self._snapshot is not None:
            self._snapshot.take()

    def go_on(self) -> None:
        """Note a step of an open episode; a resumed one goes back to here where its start is lost.

        Reads nothing from the device.
        """
        if self._snapshot is not None and not self._snapshot.is_taken:
            self._snapshot.take()

    def forget(self) -> None:
        """Let go of the start of an episode that is not the open one any more."""
        if self._snapshot is not None:
            self._snapshot.discard()

    @staticmethod
    def looks(steps: int, episode_length: int) -> bool:
        """Whether to look at the losses after so many steps of an episode."""
        doubled = steps >= FIRST_LOOK and steps & (steps - 1) == 0
        return doubled or steps == episode_length

    def has_diverged(self, losses: Sequence[float], reference: float) -> bool:
        """Whether the later half of an episode's losses lies too far above the reference.

        Args:
            losses: its step losses so far, shape (n,), n >= 1.
            reference: the smoothed loss that the last sound episode ended with, or this one's
                first loss.
        """
        later = losses[len(losses) // 2 :]
        rise = sum(later) / len(later) - reference
        return len(losses) > 1 and rise > (self._factor - 1.0) * abs(reference)

    def undo(self) -> str:
        """Take the episode back where a snapshot is kept; return what was done."""
        if self._snapshot is None:
            return CUT
        self._snapshot.restore()
        return ROLLED_BACK

    def save(self, path: Path) -> None:
        """Write the snapshot, if one is kept, for a checkpoint amid an episode."""
        if self._snapshot is None or not self._snapshot.is_taken:
            return
        try:
            self._snapshot.save(path)
        except TypeError as error:
            logger.warning(
                "A run resumed from %s goes back to there at worst, not to where its episode "
                "began: %s",
                path.parent,
                error,
            )

    def load(self, path: Path) -> None:
        """Read what `save` wrote, if it wrote anything.

        Raises:
            StateError: the file is damaged or another model's.
        """
        if self._snapshot is not None and path.exists():
            self._snapshot.load(path)
