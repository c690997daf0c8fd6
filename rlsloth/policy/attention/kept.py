"""Attention in two halves, so that activation checkpointing need not compute the first one again.

The forward's results (output and log-sums) are all that the backward needs besides queries, keys
and values. Where the plan keeps them (policy/activations), the layer's second forward takes them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsloth.policy.activations.passes import current_pass
from rlsloth.policy.attention.backend import Halves
from rlsloth.policy.attention.layout import PackedLayout
from rlsloth.policy.attention.shared_prompts import backward, forward


class KeptAttention(torch.autograd.Function):
    """Attention over a packed stream whose results a checkpointed layer may have kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        halves: Halves,
        packed: PackedLayout,
        scale: float,
    ) -> Tensor:
        layer = current_pass()
        kept = None if layer is None else layer.take("attention")
        out, sums = kept or forward(halves, q, k, v, packed, scale)
        if layer is not None:
            layer.keep("attention", (out, sums), layer.placement.attention)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.halves, ctx.packed, ctx.scale = halves, packed, scale
        ctx.parts = 1 if layer is None else layer.placement.attention_parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (q, k, v, out, sums) = grads, ctx.saved_tensors
        how = ctx.halves, ctx.packed, ctx.scale
        parts = math.gcd(ctx.parts, k.shape[1])
        if parts == 1:
            return (*backward(*how, grad, q, k, v, out, sums), None, None, None)
        # Key heads with their query heads, one part after another: the backward's float32 buffers
        # are as large as one part.
        found = tuple(torch.empty_like(x) for x in (q, k, v))
        for part in range(parts):
            grad_p, q_p, k_p, v_p, out_p = (_part(x, 1, part, parts) for x in (grad, q, k, v, out))
            made = backward(*how, grad_p, q_p, k_p, v_p, out_p, _part(sums, 0, part, parts))
            for whole, piece in zip(found, made, strict=True):
                _part(whole, 1, part, parts).copy_(piece)
        return (*found, None, None, None)


def _part(x: Tensor, dim: int, part: int, parts: int) -> Tensor:
    size = x.shape[dim] // parts
    return x.narrow(dim, part * size, size)


def attend_in_halves(
    q: Tensor, k: Tensor, v: Tensor, halves: Halves, packed: PackedLayout, scale: float
) -> Tensor:
    """Attend over a packed stream.

    Args:
        q: [heads, T, D].
        k, v: [kv_heads, T, D].
        halves: the backend's forward and backward.
        packed: the stream's layout.
        scale: factor of the scores.

    Returns:
        [T, heads, D].
    """
    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    return KeptAttention.apply(q, k, v, halves, packed, scale)  # type: ignore[no-untyped-call, no-any-return]
