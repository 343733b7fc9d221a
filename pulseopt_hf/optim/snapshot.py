"""Snapshots: what a training step changes, copied to host memory to be put back if it did harm."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from pulseopt_hf.aees.state import StateError
from pulseopt_hf.optim.noise import all_parameters
from pulseopt_hf.optim.unwrap import innermost


class Snapshot:
    """One copy of the trained parameters, the optimizer's state and the model's buffers.

    Of a sharded parameter each rank keeps its own shard. The copy is in host memory, pinned where
    the parameters are on CUDA, and its memory is used again by the next `take`: with Adam it is
    three times the trained parameters, held from the first `take` to `discard`.

    Args:
        optimizer: the optimizer, wrapped by Accelerate or not; its parameters are those trained.
        buffers: tensors that training changes besides, such as a batch norm's running means.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, buffers: Iterable[Tensor] = ()) -> None:
        """See the class."""
        self._optimizer = innermost(optimizer)
        self._buffers = list(buffers)
        self._copies: dict[str, Tensor] = {}
        self._numbers: dict[str, Any] = {}
        self._spare: dict[str, Tensor] = {}

    @property
    def is_taken(self) -> bool:
        """Whether there is something to restore."""
        return bool(self._copies)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that are held."""
        return sum(t.nbytes for t in {**self._spare, **self._copies}.values())

    @torch.no_grad()
    def take(self) -> None:
        """Copy what is there now, instead of what was copied before."""
        self._spare.update(self._copies)
        self._copies, self._numbers = {}, {}
        for name, value in self._named_values():
            if isinstance(value, Tensor):
                self._copies[name] = self._copy(name, _local(value))
            else:
                self._numbers[name] = value

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copy back in place, bit for bit; it stays and can be restored again.

        State that the optimizer has made since then is removed, as if it had not stepped.

        Raises:
            RuntimeError: nothing was taken.
        """
        if not self.is_taken:
            raise RuntimeError("There is no snapshot to restore; call `take` first.")
        for name, tensor in self._named_tensors():
            _local(tensor).copy_(self._copies[name])
        for index, parameter in enumerate(all_parameters(self._optimizer)):
            prefix = f"state.{index}."
            now: dict[str, Any] = self._optimizer.state.get(parameter, {})
            for key in list(now):
                name = prefix + key
                if name in self._copies:
                    _local(now[key]).copy_(self._copies[name])
                elif name in self._numbers:
                    now[key] = self._numbers[name]
                else:
                    del now[key]
            if not now:
                self._optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put back the buffers alone."""
        for index, buffer in enumerate(self._buffers):
            _local(buffer).copy_(self._copies[f"buffer.{index}"])

    @torch.no_grad()
    def distance(self) -> tuple[float, float]:
        """Return how far the trained matrices have moved since `take`, and how large they were.

        Both are squared L2 norms over this rank's parts of all trained parameters of two or more
        dimensions. One that was all zeros is left out, since any step is infinitely large for it.
        Reads the device once for each.
        """
        moved = size = 0.0
        for index, parameter in enumerate(all_parameters(self._optimizer)):
            before = self._copies[f"parameter.{index}"]
            norm = float(before.float().square().sum())
            if before.dim() >= 2 and norm > 0.0:
                size += norm
                moved += float((_local(parameter).cpu() - before).float().square().sum())
        return moved, size

    def discard(self) -> None:
        """Let go of the copy and its memory."""
        self._copies, self._numbers, self._spare = {}, {}, {}

    def save(self, path: Path) -> None:
        """Write the copy as one safetensors file."""
        numbers = {"numbers": json.dumps(self._numbers)}
        save_file({name: t.contiguous() for name, t in self._copies.items()}, path, numbers)

    def load(self, path: Path) -> None:
        """Read what `save` wrote, for the same model and optimizer.

        Raises:
            StateError: the file is missing or damaged, or is another model's.
        """
        try:
            with safe_open(path, framework="pt") as file:
                copies = {name: file.get_tensor(name) for name in file.keys()}
                numbers = json.loads((file.metadata() or {}).get("numbers", "{}"))
        except (OSError, SafetensorError, ValueError) as error:
            raise StateError(f"The snapshot {path} cannot be read: {error}") from error
        for name, tensor in self._named_tensors():
            if name not in copies or copies[name].shape != _local(tensor).shape:
                raise StateError(f"The snapshot {path} is another model's: `{name}` differs.")
        self._copies, self._numbers = copies, numbers

    def _named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        for index, parameter in enumerate(all_parameters(self._optimizer)):
            yield f"parameter.{index}", parameter
        for index, buffer in enumerate(self._buffers):
            yield f"buffer.{index}", buffer

    def _named_values(self) -> Iterable[tuple[str, Any]]:
        yield from self._named_tensors()
        for index, parameter in enumerate(all_parameters(self._optimizer)):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                yield f"state.{index}.{key}", value

    def _copy(self, name: str, source: Tensor) -> Tensor:
        target = self._spare.pop(name, None)
        if target is None or target.shape != source.shape or target.dtype != source.dtype:
            target = torch.empty(
                source.shape, dtype=source.dtype, device="cpu", pin_memory=source.is_cuda
            )
        return target.copy_(source)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
