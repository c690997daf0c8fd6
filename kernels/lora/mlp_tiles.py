"""A gated MLP in tiles of rows, with one tile's activations in memory at a time.

Only the input is kept for the backward, which computes gate and up again, tile by tile. This trades
half an MLP's forward for 2 x F elements a token (ALST, Bekman et al. 2025, tiles frozen MLPs so).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsloth.kernels.lora.layer import leaves
from rlsloth.kernels.lora.mlp import Parts, inner, outer, row_gradients
from rlsloth.kernels.nf4.ahead import dequantize_ahead

ROWS = 128
"""Tiles have a multiple of this many rows: tiles of a product on the GPU are as high."""


def tiles(tokens: int, most: int) -> list[slice]:
    """Cut rows into the fewest tiles of at most ``most`` rows (rounded to ROWS), alike in size."""
    count = -(-tokens // most)
    size = -(-tokens // (count * ROWS)) * ROWS
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def forward(x_TH: Tensor, parts: Parts, most: int) -> Tensor:
    """Return ``down(act(gate(x)) * up(x))`` in tiles of at most ``most`` rows."""
    y_TH = x_TH.new_empty(x_TH.shape[0], parts.layers[2].weight.shape[0])
    for tile in tiles(x_TH.shape[0], most):
        matrices = dequantize_ahead(parts.jobs())
        h_wide, *_ = inner(x_TH[tile], parts, matrices)
        y_TH[tile] = outer(h_wide, parts, matrices)
    return y_TH


class TiledOuterFunction(torch.autograd.Function):
    """The MLP's forward; like ``mlp.OuterFunction`` it saves nothing.

    The second forward of activation checkpointing leaves it out, so that the MLP is computed again
    only once, in the inner function's backward.
    """

    @staticmethod
    def forward(ctx: Any, token_TH: Tensor, x_TH: Tensor, parts: Parts, most: int) -> Tensor:
        return forward(x_TH, parts, most)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        return grad_TH, None, None, None


class TiledInnerFunction(torch.autograd.Function):
    """The MLP's backward; it keeps x. The forward returns a token of y's shape without content."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, parts: Parts, most: int, *parameters: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x_TH, *parts.tensors, *parameters)
        ctx.layers, ctx.activation, ctx.most = parts.layers, parts.activation, most
        return x_TH.new_empty(()).expand(x_TH.shape[0], parts.layers[2].weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, *copies = ctx.saved_tensors
        with torch.autocast(x_TH.device.type, enabled=False):
            parts = Parts(ctx.layers, ctx.activation, copies[:5])
            grad_x_TH, grads = _backward(
                x_TH, grad_TH, parts, ctx.most, with_input=ctx.needs_input_grad[0]
            )
        return grad_x_TH, None, None, *grads


def _backward(
    x_TH: Tensor, grad_TH: Tensor, parts: Parts, most: int, *, with_input: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    grad_x_TH = torch.empty_like(x_TH) if with_input else None
    sums: list[Tensor | None] = []
    for tile in tiles(x_TH.shape[0], most):
        x_RH = x_TH[tile]
        _, gate_wide, up_RF, low_RR = inner(x_RH, parts, dequantize_ahead(parts.jobs()))
        del _  # h, which the gradients do not need
        grad_x_RH, grads = row_gradients(
            parts, x_RH, gate_wide, up_RF, low_RR, grad_TH[tile], with_input, wide=True
        )
        if grad_x_TH is not None and grad_x_RH is not None:
            grad_x_TH[tile] = grad_x_RH
        for total, grad in zip(sums, grads, strict=bool(sums)):
            if total is not None and grad is not None:
                total += grad
        sums = sums or grads
    rounded = zip(sums, leaves(parts.layers), strict=True)
    return grad_x_TH, [g if g is None or p is None else g.to(p.dtype) for g, p in rounded]
