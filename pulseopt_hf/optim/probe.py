"""The probe: forward calls of a model in training, replayed to see what a step changed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from pulseopt_hf.aees.calibration import finite_movement
from pulseopt_hf.aees.json_checks import StateError
from pulseopt_hf.optim import trees
from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.movement import (
    Reading,
    distance,
    noise,
    positions,
    read,
    read_body,
    unit,
)
from pulseopt_hf.optim.randomness import kept_random_state, seed_all

DRAWS = 2  # of noise, for each call
ROWS = 32  # over all ranks, after which no more calls are noted
POSITIONS = 1 << 13  # of logits over all ranks, after which neither


@dataclass(frozen=True)
class Call:
    """A noted forward call, with copies of what the module was given."""

    module: int  # index among the probe's modules
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: bool
    dtype: torch.dtype


class Probe:
    """Notes the first forward calls of a model in training, and replays them.

    Only outermost calls under gradient are noted: a generation, a reference or a reward is none,
    and neither is a submodule's. A call is replayed whole, since a loss may couple its rows, in
    eval mode and without gradient. Random states, modes and gradients stay as they were.

    A step is measured by calls of earlier steps, because it always does well on its own batch.
    Before there are any, its own have to do.

    Args:
        model: the model as the training loop calls it, wrapped or not.
        agreement: how ranks agree; all of them replay equally many calls.
        device: device of the parameters.
        body: last layer of a model whose head is new, which is read beside the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        agreement: Agreement,
        device: torch.device,
        body: nn.Module | None = None,
    ) -> None:
        self._agreement = agreement
        self._device = device
        self._body = body
        self._modules = list(_wrappers(model))
        self._depth = 0
        self._rows = 0
        self._positions = 0
        self._is_noting = False
        self._new: list[Call] = []  # of the step that runs
        self._calls: list[Call] = []  # of the steps before
        self._before: list[list[Reading]] = []  # of the calls that are replayed now
        self._units: list[list[float]] = []  # squared, of the noted calls: outputs and body
        self._versions: list[int] = []  # of the buffers when `_before` was read
        self._handles: list[RemovableHandle] = []
        self.replayed_rows = 0  # in forward passes, for what they cost

    def listen(self) -> None:
        """Begin to note calls."""
        untraced: Any = torch.compiler.disable
        enter, leave = untraced(self._enter), untraced(self._leave)
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))

    def close(self) -> None:
        """Take the hooks off the model and let go of the calls."""
        self._stop()
        self._new, self._calls, self._before = [], [], []

    @property
    def is_own_batch(self) -> bool:
        """Whether the calls that are replayed now are those of the step that runs."""
        return not self._calls

    def begin(self) -> bool:
        """Read what the calls compute before a trial; every rank must call it.

        Returns:
            Whether there is anything to measure on every rank.
        """
        del self._new[self._agreement.least(len(self._new)) :]
        replayed = self._calls or self._new
        versions = [buffer._version for buffer in self._modules[-1].buffers()]
        if versions != self._versions:  # running statistics move with every batch
            self._before, self._versions = [], versions
        self._before += self._replay(replayed[len(self._before) :])
        self._measure_noise(replayed)
        return self._agreement.least(sum(outputs for outputs, _ in self._units) > 0.0) > 0

    def movement(self) -> float:
        """Measure how far the outputs are from where `begin` read them; every rank must call it.

        Returns:
            The root mean square over positions and ranks, in units of what noise does, of the
            outputs or of the body, whichever is larger; see `pulseopt_hf.optim.movement`.
        """
        moved = [0.0, 0.0]
        for before, after in zip(self._before, self._replay(self._calls or self._new), strict=True):
            for one, other in zip(before, after, strict=True):
                moved[one.is_body] += distance(one, other)
        units = self._units[: len(self._before)]
        sizes = [sum(one[kind] for one in units) for kind in range(2)]
        means = self._agreement.mean([*moved, *sizes])
        pairs = zip(means[:2], means[2:], strict=True)
        shares = [m / size if m >= 0.0 else math.nan for m, size in pairs if size]
        return finite_movement(math.sqrt(max(shares, key=finite_movement, default=math.nan)))

    def _measure_noise(self, calls: list[Call]) -> None:
        """Measure how far noise moves the outputs of calls that were not measured yet."""
        for index in range(len(self._units), len(calls)):
            self._units.append([0.0, 0.0])
            for draw in range(DRAWS):
                with noise(self._modules[0], DRAWS * index + draw):
                    (noisy,) = self._replay([calls[index]])
                for before, after in zip(self._before[index], noisy, strict=True):
                    self._units[index][before.is_body] += unit(before, after) / DRAWS

    def end_step(self) -> None:
        """Keep the calls of the step that ends, for the trials of later ones."""
        self._calls += self._new
        self._new = []
        if self._has_enough:
            self._stop()

    def save(self, path: Path) -> None:
        """Write the calls into a checkpoint.

        Raises:
            TypeError: a call was given something that JSON has no word for.
        """
        tensors: dict[str, Tensor] = {}
        calls = [
            (call.module, call.args, call.kwargs, call.autocast, str(call.dtype)[6:])
            for call in self._calls
        ]
        rest = trees.take_apart(calls, "calls", tensors)
        units = self._units[: len(calls)]
        sizes = {"rows": self._rows, "positions": self._positions}
        trees.save(path, tensors, {"calls": rest, **sizes, "units": units})

    def load(self, path: Path) -> None:
        """Go on with the calls that `save` wrote.

        Raises:
            StateError: the file is missing or damaged.
        """
        tensors, rest = trees.load(path)
        tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        try:
            self._rows, self._positions = int(rest["rows"]), int(rest["positions"])
            self._units = [[float(outputs), float(body)] for outputs, body in rest["units"]]
            calls = trees.put_together(rest["calls"], tensors)
            self._calls = [
                Call(module, args, kwargs, autocast, getattr(torch, dtype))
                for module, args, kwargs, autocast, dtype in calls
            ]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise StateError(f"{path} holds no calls of a model: {error!r}") from error
        self.end_step()

    @property
    def _has_enough(self) -> bool:
        ranks = self._agreement.world_size
        return self._rows * ranks >= ROWS or self._positions * ranks >= POSITIONS

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled() or self._has_enough:
            return
        args, kwargs = trees.map_tensors((args, kwargs), lambda tensor: tensor.detach().clone())
        kind = self._device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._new.append(Call(self._modules.index(module), args, kwargs, *autocast))
        self._rows += _rows((args, kwargs))
        self._is_noting = True

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._is_noting and self._depth == 0:
            self._is_noting = False
            self._positions += positions(output)

    def _replay(self, calls: list[Call]) -> list[list[Reading]]:
        if not calls:
            return []
        found = []
        config = getattr(self._modules[-1], "config", None)
        kind = getattr(config, "problem_type", None)
        with self._untouched(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for call in calls:
                module = self._modules[call.module]
                if isinstance(module, DistributedDataParallel):
                    module = module.module  # the wrapper would send buffers to the other ranks
                self.replayed_rows += _rows((call.args, call.kwargs))
                # A model that draws in eval mode has to draw the same before and after a step.
                seed_all(self._device, 0)
                # A forward may add to a mapping that it was given.
                args, kwargs = trees.map_tensors((call.args, call.kwargs), lambda tensor: tensor)
                with (
                    torch.autocast(self._device.type, call.dtype, enabled=call.autocast),
                    _outputs_of(self._body) as hidden,
                ):
                    output = module(*args, **kwargs)
                labels = kind == "multi_label_classification"
                given = args[0] if args and isinstance(args[0], dict) else kwargs
                found.append(read(output, given, multi_label=labels))
                for value in hidden:
                    found[-1] += read_body(value, given)
        return found

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Put modules into eval mode, and see to it that nothing else changes."""
        training = [module for module in self._modules[0].modules() if module.training]
        depth, self._depth = self._depth, 1  # so that replays are not noted
        with kept_random_state(self._device):
            for module in training:
                module.training = False
            try:
                yield
            finally:
                self._depth = depth
                for module in training:
                    module.training = True
                for module in self._modules[0].modules():
                    # A forward without a backward leaves FSDP2 with whole parameters, and the
                    # next one would not see what a step did to their shards.
                    if isinstance(module, FSDPModule):
                        module.reshard()


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a model and what it wraps, outermost first, as far as hooks do not disturb it.

    A hook inside of a compiled module would be compiled, so the compiled one is the last.
    """
    yield model
    inner = getattr(model, "module", None)
    wraps = type(model).__name__ in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")
    if wraps and isinstance(inner, nn.Module):
        yield from _wrappers(inner)


@contextmanager
def _outputs_of(module: nn.Module | None) -> Iterator[list[object]]:
    """Collect what a module returns meanwhile."""
    outputs: list[object] = []
    if module is None:
        yield outputs
        return
    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _rows(tree: Any) -> int:
    """Return the length of the first tensor that has one."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.extend(tensor.shape[:1])
        return tensor

    trees.map_tensors(tree, note)
    return sizes[0] if sizes else 1
