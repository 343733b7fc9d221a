"""What of a model was trained before, by the distribution of its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.scalars import norm

DRAWN = (1.8, 3.0)  # kurtosis of a uniform and of a normal distribution
NEAR = 0.05  # of these, with five standard errors of a sample, is what was just drawn
MOSTLY = 0.9  # share of its weights by which a model is new


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

    Weights are drawn from a normal or a uniform distribution, and their kurtosis tells how long
    ago: training makes some rows and columns larger than others. A new head or adapter on a
    pretrained model is a small part of it. Reads the device once; every rank must call it.

    Args:
        model: the model as the loop calls it; of sharded parameters each rank has its parts.
        agreement: how ranks agree.
    """
    layers = _layers(model)
    inner = {id(parameter) for layer in layers for parameter in layer.parameters()}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    inner |= {id(parameter) for table in tables for parameter in table.parameters()}
    sums: list[float | Tensor] = []
    is_outer: list[bool] = []
    for parameter in model.parameters():
        # DeepSpeed's stage 3 leaves a parameter's shape in `ds_shape`, and a part in `ds_tensor`.
        part = getattr(parameter, "ds_tensor", parameter).detach()
        part = part.to_local() if isinstance(part, DTensor) else part
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        if dimensions > 1 and part.is_floating_point():
            sums += [float(part.numel()), norm(part) ** 2, norm(part, 4) ** 4]
            is_outer.append(dimensions == 2 and id(parameter) not in inner)
    means = agreement.mean(sums) if sums else []
    new = known = 0.0
    has_new_head = False
    figures = zip(means[::3], means[1::3], means[2::3], is_outer, strict=True)
    for count, squares, fourths, outer in figures:
        if squares > 0.0:
            kurtosis = count * fourths / squares**2
            near = max(NEAR, 5.0 * math.sqrt(24.0 / count))
            is_new = any(abs(kurtosis - drawn) < near for drawn in DRAWN)
            known += count
            new += count * is_new
            has_new_head |= is_new and outer
    if new > MOSTLY * known:
        return Newness(layers=len(layers))
    return Newness(None, has_new_head, layers[-1] if layers and has_new_head else None)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules in the outermost lists of modules, which is where layers are kept."""
    if isinstance(model, nn.ModuleList):
        return list(model)
    return [layer for child in model.children() for layer in _layers(child)]
