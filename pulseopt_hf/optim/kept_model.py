"""A model that training steps go through without changing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def kept_model(model: nn.Module, trained: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put back a model's gradients, modes and buffers at the end; parameters do not change.

    Args:
        model: the model.
        trained: parameters that have gradients besides.
    """
    gradients = [(parameter, parameter.grad) for parameter in [*model.parameters(), *trained]]
    training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, was_training in training:
            module.training = was_training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
