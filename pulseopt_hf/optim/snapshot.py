"""Snapshots: all that an optimizer step changes, copied to host memory to be put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pulseopt_hf.aees.json_checks import StateError
from pulseopt_hf.optim import trees
from pulseopt_hf.optim.scalars import norm
from pulseopt_hf.optim.unwrap import innermost, shape_of, stepped_parameters, zero_3_part

# A scheduler owns these; a step only reads them.
_SCHEDULED = ("params", "lr", "initial_lr")


class Snapshot:
    """One copy of the trained parameters, the optimizer's state and scalars, and the buffers.

    Of a sharded parameter each rank keeps its own shard. The copy is in host memory, pinned where
    the parameters are on CUDA, and its memory is used again by the next `take`. Before a first step
    it is as large as the trained parameters; with Adam it is three times that after one.

    Args:
        optimizer: the optimizer, wrapped or not; its parameters are those trained.
        buffers: tensors that training changes besides, such as a batch norm's running means.
        parameters: the model's, where an engine's optimizer steps parts of its own making instead.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buffers: Iterable[Tensor] = (),
        parameters: Iterable[Tensor] = (),
    ) -> None:
        self._optimizer = innermost(optimizer)
        self._stepped = stepped_parameters(optimizer)
        self._buffers = list(buffers)
        self._parameters = list(parameters)
        self._copies: dict[str, Tensor] = {}
        self._rest: dict[str, Any] = {}  # of state and scalars what is no tensor
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
        self._copies, self._rest = {}, {}
        tensors = dict(self._named_tensors())
        for name, tree in self._named_trees():
            self._rest[name] = trees.take_apart(tree, name, tensors)
        for name, tensor in tensors.items():
            self._copies[name] = self._copy(name, _local(tensor))

    @torch.no_grad()
    def add(self, buffers: Iterable[Tensor]) -> None:
        """Copy further buffers, as they are now, beside what was copied before."""
        first = len(self._buffers)
        self._buffers += buffers
        for index, buffer in enumerate(self._buffers[first:], first):
            self._copies[f"buffer.{index}"] = self._copy(f"buffer.{index}", buffer)

    @torch.no_grad()
    def restore(self, *, buffers: bool = True) -> None:
        """Put the copy back in place, bit for bit; it stays and can be restored again.

        State that the optimizer has made since then is removed, as if it had not stepped.

        Args:
            buffers: whether to put back the buffers too, which forward passes change, not steps.

        Raises:
            RuntimeError: nothing was taken.
        """
        if not self.is_taken:
            raise RuntimeError("There is no snapshot to restore; call `take` first.")
        for name, tensor in self._named_tensors():
            if buffers or not name.startswith("buffer."):
                _local(tensor).copy_(self._copies[name], non_blocking=True)
        now: dict[str, Tensor] = {}
        for name, tree in self._named_trees():
            trees.take_apart(tree, name, now)
        old = {name: self._back(now.get(name), name) for name in self._copies if "/" in name}
        state = self._optimizer.state
        for index, parameter in enumerate(self._stepped):
            saved = self._rest.get(f"state/{index}")
            if saved is not None:
                state[parameter] = trees.put_together(saved, old)
            elif parameter in state:
                del state[parameter]
        for index, group in enumerate(self._optimizer.param_groups):
            saved = trees.put_together(self._rest[f"group/{index}"], old)
            for key in [key for key in group if key not in saved and key not in _SCHEDULED]:
                del group[key]
            group.update(saved)

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Return how far the trained matrices have moved since `take`, and how large they were.

        Both as squared L2 norms and numbers of elements, over this rank's parts of all trained
        parameters of two or more dimensions: float64 of shape (4,). A matrix that has not moved is
        left out of the first, one that was all zeros out of the second: under LoRA the first step
        moves one factor of each product, which is zero, and later ones move the other as far.
        Computed where the parameters are, one parameter at a time.
        """
        norms, counts = [torch.zeros(2)], [0]
        for name, tensor in self._named_tensors():
            if name.startswith("matrix."):
                now = _local(tensor)
                before = self._copies[name].to(now.device, non_blocking=True)
                norms.append(torch.stack([norm(now - before), norm(before)]))
                counts.append(now.numel())
        squares = torch.stack([pair.to(norms[-1].device) for pair in norms]).double().square()
        elements = torch.tensor(counts, device=squares.device)[:, None] * (squares != 0.0)
        return torch.stack([squares.sum(0), elements.sum(0)], dim=1).flatten()

    def discard(self) -> None:
        """Let go of the copy and its memory."""
        self._copies, self._rest, self._spare = {}, {}, {}

    def save(self, path: Path) -> None:
        """Write the copy as one file.

        Raises:
            TypeError: the optimizer's state holds something that JSON has no word for.
        """
        trees.save(path, self._copies, self._rest)

    def load(self, path: Path) -> None:
        """Read what `save` wrote, for the same model and optimizer.

        Raises:
            StateError: the file is missing or damaged, or is another model's.
        """
        copies, rest = trees.load(path)
        for name, tensor in self._named_tensors():
            if name not in copies or copies[name].shape != _local(tensor).shape:
                raise StateError(f"The snapshot {path} is another model's: `{name}` differs.")
        groups = {f"group/{i}" for i in range(len(self._optimizer.param_groups))}
        if not isinstance(rest, dict) or not groups <= rest.keys():
            raise StateError(f"The snapshot {path} is another optimizer's.")
        self._copies, self._rest = copies, rest

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a step changes in place; matrices by a name of their own, see `distance`."""
        seen = set()
        for index, parameter in enumerate(self._stepped):
            seen.add(id(parameter))
            yield f"{'matrix' if parameter.dim() >= 2 else 'parameter'}.{index}", parameter
        for index, parameter in enumerate(self._parameters):
            if parameter.requires_grad and id(parameter) not in seen:
                yield from _engine_parts(index, parameter)
        for index, buffer in enumerate(self._buffers):
            yield f"buffer.{index}", buffer

    def _named_trees(self) -> Iterator[tuple[str, Any]]:
        """Yield what a step may put others in the place of."""
        state = self._optimizer.state
        for index, parameter in enumerate(self._stepped):
            if parameter in state:
                yield f"state/{index}", state[parameter]
        for index, group in enumerate(self._optimizer.param_groups):
            yield f"group/{index}", {k: v for k, v in group.items() if k not in _SCHEDULED}

    def _back(self, now: Tensor | None, name: str) -> Tensor:
        """Return a state's tensor as it was: the same object where it still is there."""
        saved = self._copies[name]
        if now is None:
            return saved.clone()
        _local(now).copy_(saved)
        return now

    def _copy(self, name: str, source: Tensor) -> Tensor:
        target = self._spare.pop(name, None)
        if target is None or target.shape != source.shape or target.dtype != source.dtype:
            target = torch.empty(
                source.shape, dtype=source.dtype, device="cpu", pin_memory=source.is_cuda
            )
        return target.copy_(source)


def _engine_parts(index: int, parameter: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Yield where DeepSpeed keeps a model's parameter: whole, or under ZeRO-3 this rank's part.

    A part has no shape of its own. Small parameters are whole on every rank besides.
    """
    part = zero_3_part(parameter)
    name = f"{'matrix' if len(shape_of(parameter)) >= 2 else 'parameter'}.model.{index}"
    if part is not None:
        yield f"{name}.part", part
        name = f"whole.{index}"
    if part is None or parameter.numel() == parameter.ds_numel:  # type: ignore[attr-defined]
        yield name, parameter.data


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
