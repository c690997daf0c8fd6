"""Root-mean-square normalisation in plain torch, in any dtype: the reference for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight_H: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute ``x * rsqrt(mean(x**2) + eps) * (offset + weight)`` over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight_H)
