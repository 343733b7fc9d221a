"""Whether a model is new, by the distribution of its weights, and how many layers it has."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.scalars import norm

DRAWN = (1.8, 3.0)  # kurtosis of a uniform and of a normal distribution
NEAR = 0.05  # of these, with five standard errors of a sample, is what was just drawn
MOSTLY = 0.9  # share of its weights by which a model is new


@torch.no_grad()
def layers_of_new_model(model: nn.Module, agreement: Agreement) -> int | None:
    """Return the number of layers of a new model, and `None` for one that was trained before.

    Weights are drawn from a normal or a uniform distribution, and their kurtosis tells how long
    ago: training makes some rows and columns larger than others. A new head or adapter on a
    pretrained model is a small part of it. Reads the device once; every rank must call it.

    Args:
        model: the model as the loop calls it; of sharded parameters each rank has its parts.
        agreement: how ranks agree.
    """
    sums: list[float | Tensor] = []
    for parameter in model.parameters():
        # DeepSpeed's stage 3 leaves a parameter's shape in `ds_shape`, and a part in `ds_tensor`.
        part = getattr(parameter, "ds_tensor", parameter).detach()
        part = part.to_local() if isinstance(part, DTensor) else part
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and part.is_floating_point():
            sums += [float(part.numel()), norm(part) ** 2, norm(part, 4) ** 4]
    means = agreement.mean(sums) if sums else []
    new = known = 0.0
    for count, squares, fourths in zip(means[::3], means[1::3], means[2::3], strict=True):
        if squares > 0.0:
            kurtosis = count * fourths / squares**2
            near = max(NEAR, 5.0 * math.sqrt(24.0 / count))
            known += count
            new += count * any(abs(kurtosis - drawn) < near for drawn in DRAWN)
    return _layers(model) if new > MOSTLY * known else None


def _layers(model: nn.Module) -> int:
    """Count the modules in the outermost lists of modules, which is where layers are kept."""
    if isinstance(model, nn.ModuleList):
        return len(model)
    return sum(_layers(child) for child in model.children())
