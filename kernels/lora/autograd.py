"""The hand-derived backward of linears that share an input, for adapters or for weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from rlsloth.kernels.lora import products
from rlsloth.kernels.lora.layer import (
    LoraLinear,
    Stack,
    gradients,
    gram,
    scaled_b,
    spans_of,
    stack,
    trained_gradients,
)
from rlsloth.kernels.nf4.ahead import Job, dequantize_ahead

Layers = tuple[LoraLinear, ...]


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of siblings (linears that share an input) in the form that the products take."""

    stacked: Stack | None
    b_OR: list[Tensor | None]  # noqa: N815 -- fields carry shape suffixes too

    @classmethod
    def of(cls, layers: Layers) -> Adapters:
        """Build the adapters from the layers' parameters."""
        return cls(stack(layers), [scaled_b(layer) for layer in layers])

    def tensors(self) -> list[Tensor | None]:
        """Return the tensors to save in the forward, from which ``again`` rebuilds the adapters."""
        return [None if self.stacked is None else self.stacked.a_RI, *self.b_OR]

    @classmethod
    def again(cls, layers: Layers, tensors: Sequence[Tensor | None]) -> Adapters:
        """Rebuild the adapters from the saved ``tensors``."""
        a_RI, *b_OR = tensors
        return cls(None if a_RI is None else Stack(a_RI, spans_of(layers)), b_OR)


def linears(x_TI: Tensor, layers: Layers, adapters: Adapters) -> tuple[list[Tensor], Tensor | None]:
    """Return each layer's output, and ``x A^T`` of the stack, which the first product makes."""
    stacked = adapters.stacked
    first, *others = layers
    below_RI = None if stacked is None else stacked.a_RI
    jobs = [Job(first.weight, below_RI=below_RI), *(Job(layer.weight) for layer in others)]
    matrices = dequantize_ahead(jobs)
    wide_TO = products.with_low(x_TI, next(matrices), first, stacked)
    outputs = [products.frozen(x_TI, next(matrices), layer) for layer in others]
    if stacked is None:
        return [wide_TO, *outputs], None
    out = first.weight.shape[0]
    low_TR = wide_TO[:, out:].clone()  # a view would keep the wide tensor alive
    outputs.insert(0, x_TI.new_empty(x_TI.shape[0], out))
    bases = [wide_TO[:, :out], *outputs[1:]]
    _add_adapters(bases, low_TR, stacked, adapters.b_OR, outputs)
    return outputs, low_TR


def linears_decoded(x_TI: Tensor, layers: Layers) -> list[Tensor]:
    """Return the outputs for a few rows, without a gradient: NF4 weights are not dequantised."""
    adapters = Adapters.of(layers)
    outputs = [products.decoded(x_TI, layer) for layer in layers]
    if (stacked := adapters.stacked) is not None:
        _add_adapters(outputs, x_TI @ stacked.a_RI.t(), stacked, adapters.b_OR, outputs)
    return outputs


def _add_adapters(
    bases: list[Tensor],
    low_TR: Tensor,
    stacked: Stack,
    factors: list[Tensor | None],
    outputs: list[Tensor],
) -> None:
    """Write ``base + low B^T`` to each layer's output, which may be its base."""
    for base_TO, span, b_OR, out_TO in zip(bases, stacked.spans, factors, outputs, strict=True):
        if b_OR is not None:
            products.add_product(base_TO, low_TR[:, span], b_OR.t(), out_TO)
        elif out_TO is not base_TO:
            out_TO.copy_(base_TO)


class LinearsFunction(torch.autograd.Function):
    """Siblings: ``dx = sum(dy W) + low A`` and ``dA = low^T x``, with ``low = scale dy B``."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        layers: Layers,
        known: list[Tensor] | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        adapters = Adapters.of(layers)
        if known is None:
            outputs, low_TR = linears(x_TI, layers, adapters)
        else:
            stacked = adapters.stacked
            outputs, low_TR = known, None if stacked is None else x_TI @ stacked.a_RI.t()
        # The layers hold the parameters; saving them too lets autograd notice a change. Their
        # copies are saved so that activation checkpointing can free them.
        ctx.save_for_backward(x_TI, low_TR, *adapters.tensors(), *parameters)
        ctx.layers = layers
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        # A gradient is None if its output was not used.
        x_TI, low_TR, *copies = ctx.saved_tensors
        adapters = Adapters.again(ctx.layers, copies[: 1 + len(ctx.layers)])
        live = [index for index, grad in enumerate(grads) if grad is not None]
        if not live:
            return (None,) * (3 + 4 * len(ctx.layers))
        with torch.autocast(x_TI.device.type, enabled=False):
            result = _gradients(
                ctx.layers, adapters, x_TI, low_TR, live, grads, ctx.needs_input_grad[0]
            )
        return tuple(result)


def _gradients(
    layers: Layers,
    adapters: Adapters,
    x_TI: Tensor,
    low_TR: Tensor,
    live: list[int],
    grads: tuple[Any, ...],
    with_input: bool,
) -> list[Tensor | None]:
    """Compute the gradients that ``LinearsFunction.backward`` returns."""
    stacked = adapters.stacked
    backward = _input_gradient if with_input else _low_gradient
    grad_x_TI, grad_low_TR = backward(layers, adapters, live, grads)
    result: list[Tensor | None] = [grad_x_TI, None, None]
    grad_a_RI = None if grad_low_TR is None else gram(grad_low_TR, x_TI)
    for index, (layer, grad) in enumerate(zip(layers, grads, strict=True)):
        if grad is None:
            result += [None] * 4
            continue
        grad_a = grad_b = None
        if stacked is not None:
            assert grad_a_RI is not None
            span = stacked.spans[index]
            grad_a, grad_b = gradients(layer, grad_a_RI[span], gram(grad, low_TR[:, span]))
        result += [grad_a, grad_b, *trained_gradients(layer, grad, x_TI)]
    return result


def _input_gradient(
    layers: Layers, adapters: Adapters, live: list[int], grads: tuple[Any, ...]
) -> tuple[Tensor, Tensor | None]:
    """Return dx and low; the product of each sibling makes its columns of low next to ``dy W``."""
    blocks = [_block(layers[index], adapters, index) for index in live]
    matrices = dequantize_ahead(
        [Job(layers[i].weight, behind_OR=b) for i, b in zip(live, blocks, strict=True)]
    )
    wide_TI: Tensor | None = None
    for index, block_OR, matrix in zip(live, blocks, matrices, strict=True):
        wide_TI = products.back_with_low(grads[index], matrix, layers[index], block_OR, wide_TI)
    assert wide_TI is not None
    if (stacked := adapters.stacked) is None:
        return wide_TI, None
    into = layers[0].weight.shape[1]
    low_TR = wide_TI[:, into:]
    grad_x_TI = wide_TI.new_empty(wide_TI.shape[0], into)
    products.add_product(wide_TI[:, :into], low_TR, stacked.a_RI, grad_x_TI)
    return grad_x_TI, low_TR


def _low_gradient(
    layers: Layers, adapters: Adapters, live: list[int], grads: tuple[Any, ...]
) -> tuple[None, Tensor | None]:
    """Return low without dx, for an x that needs no gradient."""
    low_TR = None
    for index in live:
        block_OR = _block(layers[index], adapters, index)
        if block_OR is not None and (low_TR is None or layers[index].lora_b is not None):
            part_TR = grads[index] @ block_OR
            low_TR = part_TR if low_TR is None else low_TR.add_(part_TR)
    return None, low_TR


def _block(layer: LoraLinear, adapters: Adapters, index: int) -> Tensor | None:
    """Return scale * B in the layer's columns of the stack, with zeros in its siblings' columns."""
    stacked, b_OR = adapters.stacked, adapters.b_OR[index]
    if stacked is None:
        return None
    total, span = stacked.a_RI.shape[0], stacked.spans[index]
    if b_OR is None:
        return stacked.a_RI.new_zeros(layer.weight.shape[0], total)
    alone = span == slice(0, total)
    return b_OR if alone else pad(b_OR, (span.start, total - span.stop))
