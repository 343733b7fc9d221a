"""What of a model was trained before, by the distribution of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.scalars import norm
from pulseopt_hf.optim.unwrap import shape_of, zero_3_part

# Kurtosis of a uniform and of a normal distribution, and of one that ends at two deviations.
DRAWN = (1.8, 3.0, 2.366)
NEAR = 0.05  # of these, with five standard errors of a sample, is what was just drawn
FLAT = 1e-5  # kurtosis beyond 1 of gains that are all alike, for the rounding of sums
MOSTLY = 0.9  # share of its weights, and of its gains, by which a model is new


@dataclass(frozen=True)
class Newness:
    """What of a model is new.

    Attributes:
        layers: number of layers of a model that is new as a whole; `None` for one that was trained.
        has_new_head: whether a model that was trained has a head that was not.
        body: what gives that head its input: the last layer, where layers are in a list.
    """

    layers: int | None = None
    has_new_head: bool = False
    body: nn.Module | None = None


@torch.no_grad()
def newness_of(model: nn.Module, agreement: Agreement) -> Newness:
    """Find out whether a model, or the head on it, is new.

    Weights are drawn from one of a few distributions, and their kurtosis tells how long ago:
    training makes some rows and columns larger than others. Those of a large model can look normal
    all the same (Dettmers et al., "QLoRA", 2023, arXiv 2305.14314, appendix F), so the gains of its
    norms count too, which are alike only as long as they are new. A new head or adapter on a
    pretrained model is a small part of it. Reads the device once; every rank must call it.

    Args:
        model: the model as the loop calls it; of sharded parameters each rank has its parts.
        agreement: how ranks agree.
    """
    layers = _layers(model)
    inner = {id(parameter) for layer in layers for parameter in layer.parameters()}
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    inner |= {id(table) for table in tables}
    # A language model's head has the shape of its vocabulary, and was trained with it.
    vocabulary = max(map(shape_of, tables), key=math.prod, default=())
    sums: list[float | Tensor] = []
    kinds: list[tuple[bool, bool]] = []  # whether it is a gain, or a matrix outside the layers
    for name, parameter in model.named_parameters():
        part, shape = zero_3_part(parameter), shape_of(parameter)
        if part is None:
            part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        is_gain = len(shape) == 1 and name.endswith("weight")
        if (len(shape) > 1 or is_gain) and part.is_floating_point():
            sums += [float(part.numel()), norm(part) ** 2, norm(part, 4) ** 4]
            is_outer = len(shape) == 2 and shape != vocabulary and id(parameter) not in inner
            kinds.append((is_gain, is_outer))
    means = agreement.mean(sums) if sums else []
    new, known = [0.0, 0.0], [0.0, 0.0]  # weights and gains
    has_new_head = False
    figures = zip(means[::3], means[1::3], means[2::3], kinds, strict=True)
    for count, squares, fourths, (is_gain, is_outer) in figures:
        if squares > 0.0:
            kurtosis = count * fourths / squares**2
            near = max(NEAR, 5.0 * math.sqrt(24.0 / count))
            is_new = any(abs(kurtosis - drawn) < near for drawn in DRAWN)
            if is_gain:
                is_new = kurtosis < 1.0 + FLAT
            known[is_gain] += count
            new[is_gain] += count * is_new
            has_new_head |= is_new and is_outer
    if new[0] > MOSTLY * known[0] and new[1] >= MOSTLY * known[1]:
        return Newness(layers=len(layers))
    return Newness(None, has_new_head, layers[-1] if layers and has_new_head else None)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules in the outermost lists of modules, which is where layers are kept."""
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [layer for child in model.children() for layer in _layers(child)]
