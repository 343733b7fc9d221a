"""How far a step moves what a model computes: read its outputs before and after, and compare.

Nothing here knows the loss function or needs labels. The unit is how far noise moves the same
outputs: dropout of a tenth of what every layer with weights is given. It takes the scale of the
outputs, the number of classes and the length of a row out of the measure.

Through a new head, the outputs of a pretrained model show little of what happens to the model
itself. There, what its last layer returns is read beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pulseopt_hf.optim.unwrap import shape_of

DROPOUT = 0.1
EMBEDDING_UNIT = 0.01  # share of their spread that embeddings move by in one unit
BODY_UNIT = 0.025  # share of what noise does that the body under a new head moves by in one unit
MOST_VALUES = 1 << 22  # of one output that are kept: 16 MiB of float32
_EMBEDDINGS = ("sentence_embedding", "pooler_output", "last_hidden_state")


@dataclass(frozen=True)
class Reading:
    """One output of a call, as it is compared.

    Attributes:
        values: shape (positions, values of a position), float32.
        is_embedding: whether they are embeddings, which have length 1.
        is_body: whether they are what the body hands to a new head.
    """

    values: Tensor
    is_embedding: bool = False
    is_body: bool = False


def read(
    output: object, arguments: Mapping[str, Any], *, multi_label: bool = False
) -> list[Reading]:
    """Read what a call of a model returned.

    Args:
        output: a mapping as Transformers' models return it, a tensor, or a tuple of them.
        arguments: the call's keyword arguments. `labels` of -100 and an `attention_mask` of 0 leave
            out positions.
        multi_label: whether each logit of a row is a decision of its own.

    Returns:
        The readings of all its logits, without what classes have in common; without logits that of
        the log-probabilities that fused heads return, or of its embeddings, else that of its loss,
        else none.
    """
    named = dict(_named(output))
    loss = named.pop("loss", None)
    found = []
    for name, value in named.items():
        if "logits" not in name and name != "scores":
            continue
        if value.dim() == 4:  # a class for each pixel: (rows, classes, height, width)
            value = value.movedim(1, -1)
        if value.dim() < 2 or value.shape[-1] == 1:
            found.append(Reading(value.detach().reshape(-1, 1).float()))
            continue
        kept = _positions(value, arguments)
        found.append(Reading(kept if multi_label else kept - kept.mean(dim=-1, keepdim=True)))
    if found:
        return found
    if "log_probs" in named:
        return [Reading(_positions(named["log_probs"][..., None], arguments))]
    for name in _EMBEDDINGS:
        if name in named:
            kept = _positions(named[name], arguments)
            return [Reading(nn.functional.normalize(kept, dim=-1), is_embedding=True)]
    return [] if loss is None else [Reading(loss.detach().float().reshape(-1, 1))]


def read_body(output: object, arguments: Mapping[str, Any]) -> list[Reading]:
    """Read what the last layer of a body returned in a call with these arguments."""
    hidden = next((value for _, value in _named(output)), None)
    if hidden is None or hidden.dim() < 2:
        return []
    return [Reading(_positions(hidden, arguments), is_body=True)]


def positions(output: object) -> int:
    """Return how many positions an output has logits for: rows, or tokens or pixels of rows."""
    found = [value for name, value in _named(output) if "logits" in name and value.dim() > 1]
    return found[0].shape[:-1].numel() if found else 0


def loss_of(output: object) -> Tensor | None:
    """Return the loss that a model's output carries, shape (), or `None`."""
    loss = dict(_named(output)).get("loss")
    return None if loss is None else loss.detach().mean()


def distance(before: Reading, after: Reading) -> float:
    """Return the squared distance of two readings of one output."""
    return float((after.values - before.values).square().sum())


def unit(before: Reading, noisy: Reading) -> float:
    """Return the squared distance that counts as one unit of movement.

    Noise moves embeddings of a trained encoder further than any good step does, as far as their
    length allows. Their unit is a share of their spread over positions.

    Args:
        before: a reading.
        noisy: the same output's under `noise`.
    """
    if before.is_embedding:
        spread = before.values - before.values.mean(dim=0)
        return EMBEDDING_UNIT**2 * float(spread.square().sum())
    return distance(before, noisy) * (BODY_UNIT**2 if before.is_body else 1.0)


@contextmanager
def noise(model: nn.Module, seed: int) -> Iterator[None]:
    """Drop a tenth of what every layer with a weight matrix is given.

    Args:
        model: the model.
        seed: of generators of its own, so that a model that draws in eval mode, such as a masked
            autoencoder, draws the same with noise and without.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def drop(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        first, *rest = args or (None,)
        if not isinstance(first, Tensor) or not first.is_floating_point():
            return args
        if first.device not in generators:
            generators[first.device] = torch.Generator(first.device).manual_seed(seed)
        drawn = generators[first.device]
        kept = torch.empty_like(first).bernoulli_(1.0 - DROPOUT, generator=drawn)
        return (first * kept.div_(1.0 - DROPOUT), *rest)

    handles = [
        module.register_forward_pre_hook(drop)
        for module in model.modules()
        if any(len(shape_of(one)) > 1 for one in module.parameters(recurse=False))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(output: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating tensors of an output by name; a bare tensor is logits."""
    if isinstance(output, Mapping):
        for name, value in output.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield str(name), value
    elif isinstance(output, Tensor):
        yield from _named({"logits": output})
    elif isinstance(output, tuple | list):
        tensors = [value for value in output if isinstance(value, Tensor)]
        if tensors and tensors[0].dim() == 0:
            yield from _named({"loss": tensors.pop(0)})
        for value in tensors[:1]:
            yield from _named({"logits": value})
    elif hasattr(output, "__dict__"):
        yield from _named(vars(output))


def _positions(values: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Return the positions that count, evenly spaced where there are many."""
    flat = values.detach().reshape(-1, values.shape[-1])
    for name, ignored in (("labels", -100), ("attention_mask", 0)):
        given = arguments.get(name)
        if isinstance(given, Tensor) and given.shape == values.shape[:-1]:
            flat = flat[(given != ignored).reshape(-1).to(flat.device)]
            break
    most = max(1, MOST_VALUES // values.shape[-1])
    kept = flat[:: math.ceil(len(flat) / most)] if len(flat) > most else flat
    return kept.float()
