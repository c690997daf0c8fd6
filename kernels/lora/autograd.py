"""The hand-derived backward of LoRA linears: no gradient of a frozen weight, in any product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsloth.kernels.glu.op import glu_backward, glu_forward
from rlsloth.kernels.lora import products
from rlsloth.kernels.lora.layer import LoraLinear, Stack, stack
from rlsloth.kernels.nf4.ahead import Job, dequantize_ahead

Layers = tuple[LoraLinear, ...]
Mlp = tuple[LoraLinear, LoraLinear, LoraLinear]
"""gate, up, down."""


def linears(x_TI: Tensor, layers: Layers, decode: bool) -> tuple[list[Tensor], Tensor | None]:
    """Each layer's output, and ``x A^T`` of the stack."""
    stacked = stack(layers)
    low_TR = None if stacked is None else x_TI @ stacked.a_RI.t()
    outputs = []
    for index, y_TO in enumerate(products.frozen(x_TI, layers, decode)):
        if stacked is not None and low_TR is not None:
            products.add_adapter(y_TO, low_TR, layers[index], stacked.spans[index])
        outputs.append(y_TO)
    return outputs, low_TR


class LinearsFunction(torch.autograd.Function):
    """Siblings: ``dx = sum(dy W) + low A`` and ``dA = low^T x`` with ``low = scale dy B``."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, layers: Layers, *adapters: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs, low_TR = linears(x_TI, layers, decode=False)
        # The adapters are the layers' own. Saved all the same: autograd then notices a change.
        ctx.save_for_backward(x_TI, low_TR, *adapters)
        ctx.layers = layers
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        # A gradient is None where an output was not used.
        x_TI, low_TR, *_ = ctx.saved_tensors
        layers: Layers = ctx.layers
        stacked = stack(layers)
        spans = (slice(0, 0),) * len(layers) if stacked is None else stacked.spans
        live = [index for index, grad in enumerate(grads) if grad is not None]
        if not live:
            return (None,) * (2 + 2 * len(layers))
        grad_low_TR = grad_a_RI = grad_x_TI = None
        if stacked is not None:
            grad_low_TR = torch.zeros_like(low_TR)
            for index in live:
                products.lower(grad_low_TR, grads[index], layers[index], spans[index])
            grad_a_RI = products.gram(grad_low_TR, x_TI)
        if ctx.needs_input_grad[0]:
            grad_x_TI = torch.empty_like(x_TI, memory_format=torch.contiguous_format)
            matrices = dequantize_ahead([Job(layers[index].weight) for index in live])
            for index, matrix_OI in zip(live, matrices, strict=True):
                products.project_back(
                    grads[index], matrix_OI, layers[index], None, grad_x_TI, index != live[0]
                )
            if stacked is not None:
                assert grad_low_TR is not None
                grad_x_TI.addmm_(grad_low_TR, stacked.a_RI)
        result: list[Tensor | None] = [grad_x_TI, None]
        for layer, span, grad in zip(layers, spans, grads, strict=True):
            if grad is None:
                result += [None, None]
            else:
                result += products.gradients(layer, span, grad_a_RI, grad, low_TR)
        return tuple(result)


def mlp_matrices(layers: Mlp) -> Iterator[Tensor]:
    """The weights of a forward in the order of their use, with room for the adapters' columns."""
    gate, up, down = layers
    siblings, last = stack((gate, up)), stack((down,))
    jobs = [Job(layer.weight, more_columns=_rank(siblings)) for layer in (gate, up)]
    return dequantize_ahead([*jobs, Job(down.weight, more_columns=_rank(last))])


def mlp_inner(
    x_TH: Tensor, layers: Mlp, activation: str, matrices: Iterator[Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """``h = act(gate(x)) * up(x)`` with ``h A^T`` behind it, and what the backward needs.

    This and ``mlp_outer`` are the same with and without gradient, bitwise: a policy ratio may be
    taken between the two, for more tokens than ``op.DECODED_ROWS``.
    """
    gate, up, down = layers
    siblings, last = stack((gate, up)), stack((down,))
    tokens, width = x_TH.shape[0], gate.weight.shape[0]
    x_wide = products.widen(x_TH, siblings)
    e_TF = x_TH.new_empty(tokens, width)
    # Room behind g for the backward: there it becomes the left factor of the last product.
    g_wide = x_TH.new_empty(tokens, width + _rank(siblings))
    g_TF = g_wide[:, :width]
    products.project(x_wide, next(matrices), gate, _span(siblings, 0), e_TF)
    products.project(x_wide, next(matrices), up, _span(siblings, 1), g_TF)
    h_wide = x_TH.new_empty(tokens, width + _rank(last))
    h_TF = glu_forward(e_TF, g_TF, activation, out=h_wide[:, :width])
    low_TR = None
    if last is not None:
        torch.mm(h_TF, last.a_RI.t(), out=h_wide[:, width:])
        low_TR = h_wide[:, width:].clone()  # h is made again by the backward; this is not
    return h_wide, (x_wide, e_TF, g_wide, low_TR)


def mlp_outer(h_wide: Tensor, down: LoraLinear, matrices: Iterator[Tensor]) -> Tensor:
    """``down(h)``."""
    y_TH = h_wide.new_empty(h_wide.shape[0], down.weight.shape[0])
    products.project(h_wide, next(matrices), down, _span(stack((down,)), 0), y_TH)
    return y_TH


class MlpOuterFunction(torch.autograd.Function):
    """down, whose backward the inner function does: the token carries y's gradient there.

    Nothing is saved here. Activation checkpointing ends its second forward with the last saved
    tensor, which the inner function holds: down, whose output nobody needs, is not run again.
    """

    @staticmethod
    def forward(
        ctx: Any, token_TH: Tensor, h_wide: Tensor, down: LoraLinear, matrices: Iterator[Tensor]
    ) -> Tensor:
        return mlp_outer(h_wide, down, matrices)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        return grad_TH, None, None, None


class MlpInnerFunction(torch.autograd.Function):
    """Keeps x, gate's and up's output; the backward overwrites the last two: it runs once.

    Returns h, which is not differentiable, and a token of y's shape without content, which is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        layers: Mlp,
        activation: str,
        matrices: Iterator[Tensor],
        *adapters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        h_wide, kept = mlp_inner(x_TH, layers, activation, matrices)
        ctx.save_for_backward(*kept, *adapters)
        ctx.layers, ctx.activation = layers, activation
        ctx.mark_non_differentiable(h_wide)
        ctx.set_materialize_grads(False)  # or h would be given zeros as wide as itself
        return x_TH.new_empty(()).expand(x_TH.shape[0], layers[2].weight.shape[0]), h_wide

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor, _: None) -> tuple[Tensor | None, ...]:
        # First of all: under activation checkpointing this runs the forward, which takes the
        # shared buffers.
        x_wide, e_TF, g_wide, low_TR, *_ = ctx.saved_tensors
        gate, up, down = ctx.layers
        siblings, last = stack((gate, up)), stack((down,))
        width, hidden = gate.weight.shape
        g_TF, g_low_TR = g_wide[:, :width], g_wide[:, width:]
        x_TH, x_low_TR = x_wide[:, :hidden], x_wide[:, hidden:]
        matrices = dequantize_ahead(
            [
                Job(down.weight, more_rows=_rank(last)),
                Job(gate.weight),
                Job(up.weight, more_rows=_rank(siblings)),
            ]
        )
        grad_wide, grad_low_TR = _with_low(grad_TH, down, last)
        grad_h_TF = torch.empty_like(e_TF)
        products.project_back(grad_wide, next(matrices), down, _a(last), grad_h_TF, False)
        h_TF, grad_e_TF, grad_g_TF = glu_backward(grad_h_TF, e_TF, g_TF, ctx.activation)
        grad_a_RI = None if last is None else products.gram(grad_low_TR, h_TF)
        down_grads = products.gradients(down, _span(last, 0), grad_a_RI, grad_TH, low_TR)

        g_low_TR.zero_()
        products.lower(g_low_TR, grad_e_TF, gate, _span(siblings, 0))
        products.lower(g_low_TR, grad_g_TF, up, _span(siblings, 1))
        grad_a_RI = None if siblings is None else products.gram(g_low_TR, x_TH)
        gate_grads = products.gradients(gate, _span(siblings, 0), grad_a_RI, grad_e_TF, x_low_TR)
        up_grads = products.gradients(up, _span(siblings, 1), grad_a_RI, grad_g_TF, x_low_TR)
        grad_x_TH = None
        if ctx.needs_input_grad[0]:
            grad_x_TH = x_wide.new_empty(x_TH.shape)
            products.project_back(grad_e_TF, next(matrices), gate, None, grad_x_TH, False)
            products.project_back(g_wide, next(matrices), up, _a(siblings), grad_x_TH, True)
        return grad_x_TH, None, None, None, *gate_grads, *up_grads, *down_grads


def _with_low(grad_TO: Tensor, layer: LoraLinear, stacked: Stack | None) -> tuple[Tensor, Tensor]:
    """dy with ``scale dy B`` behind it, and that part of it. dy is others' too: never written."""
    if stacked is None:
        return grad_TO, grad_TO[:, :0]
    tokens, out = grad_TO.shape
    wide_TO = grad_TO.new_empty(tokens, out + _rank(stacked))
    wide_TO[:, :out].copy_(grad_TO)
    low_TR = wide_TO[:, out:].zero_()
    products.lower(low_TR, wide_TO[:, :out], layer, stacked.spans[0])
    return wide_TO, low_TR


def _rank(stacked: Stack | None) -> int:
    return 0 if stacked is None else stacked.a_RI.shape[0]


def _span(stacked: Stack | None, index: int) -> slice:
    return slice(0, 0) if stacked is None else stacked.spans[index]


def _a(stacked: Stack | None) -> Tensor | None:
    return None if stacked is None else stacked.a_RI
