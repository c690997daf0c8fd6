"""Outputs and gradients of an attention backend."""

from __future__ import annotations

from typing import Any

import torch

from rlsloth.policy.attention.backends import BACKENDS
from rlsloth.policy.attention.layout import PackedLayout

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def attended(
    backend: str, micro: Any, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """Compute the output [T, heads, D] for random input, and the gradients of q, k and v."""
    total = len(micro.token_ids)
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    # As the layers give them: [T, heads, D] seen as [heads, T, D].
    q, k, v = (random(total, h, WIDTH).transpose(0, 1) for h in (HEADS, KV_HEADS, KV_HEADS))
    for x in (q, k, v):
        x.requires_grad_()
    out = BACKENDS[backend].attend(q, k, v, PackedLayout(micro, backend), 0.3)
    grads = torch.autograd.grad((out * random(total, HEADS, WIDTH)).sum(), (q, k, v))
    return (out.detach(), *grads)
