"""Scalars on a device, and the one read that brings many of them to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stack(values: Sequence[float | Tensor]) -> Tensor:
    """Join scalars of shape () to one tensor of shape (n,).

    Tensors keep their device and at least float32; plain floats become float64, which they are.
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return torch.tensor(values, dtype=torch.float64)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if wide else torch.float32
    device = tensors[0].device
    return torch.stack([torch.as_tensor(v, dtype=dtype, device=device).reshape(()) for v in values])


def norm(tensor: Tensor, order: float = 2) -> Tensor:
    """Return the vector norm of a tensor of any type, float32 of shape (), on its device."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    found: Tensor = torch.linalg.vector_norm(tensor, order, dtype=wide).float()
    return found
