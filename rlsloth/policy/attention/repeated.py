"""Repeat prompts in a packed stream, so that each completion is a causal sequence of its own.

Kernels that do not support trees can then attend over the stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsloth.policy.attention.layout import PackedLayout, Repeated


class _Repeat(torch.autograd.Function):
    """Repeat prompts: [T, ...] to [T_kv, ...].

    Plain indexing gives the same values, but it sums the gradient in the type of ``x`` and sorts
    all rows for that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Repeated, summed: bool) -> Tensor:
        ctx.rows, ctx.summed = rows, summed
        return x.index_select(0, rows.index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), rows = grads, ctx.rows
        own = grad.index_select(0, rows.own)
        if not ctx.summed or not len(rows.again):
            return own, None, None
        total, places = own.float(), (rows.index[rows.again],)
        total.index_put_(places, grad.index_select(0, rows.again).float(), accumulate=True)
        return total.to(grad.dtype), None, None


class _Keep(torch.autograd.Function):
    """Drop the repetitions of prompts: [T_kv, ...] to [T, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Repeated) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), rows = grads, ctx.rows
        spread = grad.new_zeros(len(rows.index), *grad.shape[1:])
        return spread.index_copy_(0, rows.own, grad), None


def repeat(x: Tensor, packed: PackedLayout, summed: bool = True) -> Tensor:
    """Repeat prompts: [heads, T, D] to [T_kv, heads, D].

    Args:
        x: queries, keys or values.
        packed: the stream's layout.
        summed: sum the gradients of a row's repetitions; otherwise only the gradient of its first
            occurrence counts.
    """
    if len(packed.kv_index) == x.shape[1]:  # no prompt is shared
        return x.transpose(0, 1).contiguous()
    return _Repeat.apply(x.transpose(0, 1), packed.repeated, summed)  # type: ignore[no-untyped-call, no-any-return]


def keep(x: Tensor, packed: PackedLayout) -> Tensor:
    """Undo ``repeat``: [T_kv, heads, D] to [T, heads, D]."""
    return _Keep.apply(x, packed.repeated)  # type: ignore[no-untyped-call, no-any-return]


def repeated_keys(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring q, k and v [heads or kv_heads, T, D] into the form of kernels for varying lengths.

    Returns:
        Queries [T, heads, D], and keys and values [T_kv, kv_heads, D] with prompts repeated.
    """
    return q.transpose(0, 1).contiguous(), repeat(k, packed), repeat(v, packed)
