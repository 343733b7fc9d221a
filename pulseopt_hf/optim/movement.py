"""How far a step moves what a model computes: read its outputs before and after, and compare.

Nothing here knows the loss function or needs labels. What a model computes is a distribution where
there are logits, and movement is the length of the step in its Fisher metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

MOST_VALUES = 1 << 22  # of one output that are kept: 16 MiB of float32
POSITIONS = 64  # that a row of many counts as, see `movement`
_EMBEDDINGS = ("sentence_embedding", "pooler_output", "last_hidden_state")


@dataclass(frozen=True)
class Reading:
    """One output of a call, as it is compared.

    Attributes:
        kind: how it is compared, see `movement`.
        values: shape (positions, values of a position), float32; see `movement` for the units.
        row_length: 1, or `POSITIONS` where a row has many positions.
    """

    kind: Literal["classes", "labels", "numbers", "embeddings", "loss"]
    values: Tensor
    row_length: float = 1.0


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
        The readings of all its logits; without logits that of the log-probabilities that fused
        heads return, or of its embeddings, else that of its loss, else none.
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
            # A number has the unit of its squared error, or is a logit of its own.
            unit = 2.0 if loss is None else max(float(loss.mean()), 1e-12) ** 0.5
            found.append(Reading("numbers", value.detach().reshape(-1, 1).float() / unit))
            continue
        kept, length = _positions(value, arguments)
        if multi_label:
            found.append(Reading("labels", kept, length))
        else:
            found.append(Reading("classes", kept.log_softmax(dim=-1), length))
    if found:
        return found
    if "log_probs" in named:
        return [Reading("numbers", *_positions(named["log_probs"][..., None], arguments))]
    for name in _EMBEDDINGS:
        if name in named:
            kept, _ = _positions(named[name], arguments)
            return [Reading("embeddings", torch.nn.functional.normalize(kept, dim=-1))]
    return [] if loss is None else [Reading("loss", loss.detach().float().reshape(-1, 1))]


def loss_of(output: object) -> Tensor | None:
    """Return the loss that a model's output carries, shape (), or `None`."""
    loss = dict(_named(output)).get("loss")
    return None if loss is None else loss.detach().mean()


def movement(before: Reading, after: Reading) -> tuple[float, float]:
    """Return the sum over positions of the squared movement, and the number of positions.

    With p the distribution before, and d the change of its logarithm, the squared movement of a
    position is

    - `classes`: the variance of d under p, which is the squared length of the step in the Fisher
      metric, and to second order twice the divergence of Kullback and Leibler between p and the
      distribution after; values are log-probabilities;
    - `labels`: the sum over labels of p (1 - p) d^2, the same for decisions; values are logits;
    - `numbers`: d^2; values are in units of their standard error, or log-probabilities;
    - `embeddings`: d^2 over the variance of the embeddings over positions; values have length 1;
    - `loss`: the squared change as a share of the loss;

    over the row's length. A row of many positions, as of a language model, teaches many things at
    once, so that a step is less noisy and may go further.

    Args:
        before: a reading.
        after: the same output's after the step.
    """
    p, change = before.values, after.values - before.values
    count = len(change)
    if before.kind == "classes":
        probability = p.exp()
        mean = (probability * change).sum(dim=-1, keepdim=True)
        moved = probability * (change - mean).square()
    elif before.kind == "labels":
        moved = p.sigmoid() * (-p).sigmoid() * change.square()
    elif before.kind == "embeddings":
        spread = (p - p.mean(dim=0)).square().sum() / max(1, count - 1)
        moved = change.square() / spread.clamp_min(1e-12)
    elif before.kind == "loss":
        moved = (change / p.abs().clamp_min(1e-12)).square()
    else:
        moved = change.square()
    return float(moved.sum()) / before.row_length, float(count)


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


def _positions(values: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, float]:
    """Return the positions that count, evenly spaced where there are many, and a row's length."""
    flat = values.detach().reshape(-1, values.shape[-1])
    for name, ignored in (("labels", -100), ("attention_mask", 0)):
        given = arguments.get(name)
        if isinstance(given, Tensor) and given.shape == values.shape[:-1]:
            flat = flat[(given != ignored).reshape(-1).to(flat.device)]
            break
    most = max(1, MOST_VALUES // values.shape[-1])
    kept = flat[:: math.ceil(len(flat) / most)] if len(flat) > most else flat
    return kept.float(), float(POSITIONS if values.dim() > 2 else 1)
