"""The step losses of the open episode, left on the device until the episode ends."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pulseopt_hf.optim.agreement import Agreement


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
