"""Step losses, left on the device until they are needed, and whether they have risen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from pulseopt_hf.aees.calibration import NOT_FINITE
from pulseopt_hf.optim.agreement import Agreement

RISE = 3.0  # standard errors by which later losses have to lie above earlier ones


class LossBuffer:
    """Collects step losses and brings them to the host all at once.

    Losses arrive as this rank measured them and are *pending* until `agree` replaces them by
    their means over ranks. Only agreed losses leave the buffer.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.agreed: list[float] = []
        self._pending: list[float | Tensor] = []

    def __len__(self) -> int:
        """Return how many step losses there are, agreed or pending."""
        return len(self.agreed) + len(self._pending)

    def append(self, loss: float | Tensor) -> None:
        """Add a step loss, shape (). Reads nothing from the device.

        A tensor is copied, since training code may go on to change it in place.
        """
        self._pending.append(loss.detach().clone() if isinstance(loss, Tensor) else float(loss))

    def agree(self, agreement: Agreement) -> list[float]:
        """Replace pending losses by their means over ranks. One device read and one all-reduce.

        Every rank must call it with as many losses pending; with none, nothing is sent.

        Returns:
            The losses agreed in this call.
        """
        if not self._pending:
            return []
        new = agreement.mean(self._pending)
        self._pending.clear()
        self.agreed.extend(new)
        return new

    def restore(self, agreed: Iterable[float]) -> None:
        """Hold these losses, which ranks have agreed on, instead of all that there are."""
        self.agreed = list(agreed)
        self._pending = []

    def clear(self) -> None:
        """Forget all losses."""
        self.restore(())


def has_risen(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether the later half of losses lies above those before by more than both scatter.

    Args:
        before: step losses at the origin, shape (n,).
        after: step losses since then; one of `NOT_FINITE` counts as risen.
    """
    later = after[len(after) // 2 :]
    if not before:
        return False
    if not later or max(later) >= NOT_FINITE:
        return True
    error = math.sqrt(_variance(before) / len(before) + _variance(later) / len(later))
    return sum(later) / len(later) - sum(before) / len(before) > RISE * error


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
