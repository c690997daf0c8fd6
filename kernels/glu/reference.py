"""Gated linear units in plain torch, in any dtype: the reference for tests."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Compute ``act(gate) * up``, where act is silu, gelu (exact) or gelu_tanh."""
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up
