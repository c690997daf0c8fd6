"""A packed stream with each prompt repeated before each of its completions, and its gradients.

Kernels that know no trees see one causal sequence a completion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsloth.policy.attention.layout import PackedLayout, Repeated


class _Repeat(torch.autograd.Function):
    """[T, ...] to [T_kv, ...]. Indexing would do it, but its gradient is summed in the type of
    ``x`` after a sort of all rows."""

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
    """[T_kv, ...] to [T, ...]: the repetitions of prompts are dropped."""

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
    """[heads, T, D] to [T_kv, heads, D] with prompts repeated.

    Args:
        summed: add the gradients of the repetitions; else only the first place of a row counts.
    """
    return _Repeat.apply(x.transpose(0, 1), packed.repeated, summed)  # type: ignore[no-untyped-call, no-any-return]


def keep(x: Tensor, packed: PackedLayout) -> Tensor:
    """[T_kv, heads, D] to [T, heads, D]: undo ``repeat``."""
    return _Keep.apply(x, packed.repeated)  # type: ignore[no-untyped-call, no-any-return]


def repeated_keys(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, heads, D] queries, and [T_kv, kv_heads, D] keys and values with prompts repeated."""
    return q.transpose(0, 1).contiguous(), repeat(k, packed), repeat(v, packed)
