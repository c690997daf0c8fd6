"""The matrix products of the LoRA ops.

A product with the frozen weight takes the adapter's along as 2r more columns, or rows, of the
dequantised weight: y, or dx, is then written once, where adding to it would read and write all of
it again. That needs an input with room for r columns, which costs a copy where it is not ours. It
pays where the output is wider than the input, and for NF4 alone: a plain weight has no room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlsloth.kernels.lora.layer import LoraLinear, Stack
from rlsloth.kernels.nf4.ahead import Job, dequantize_ahead
from rlsloth.kernels.nf4.op import Nf4Weight, nf4_matmul


def frozen(x_TI: Tensor, layers: Sequence[LoraLinear], decode: bool) -> Iterator[Tensor]:
    """``x W^T + bias`` of each layer; with ``decode`` NF4 is multiplied where it lies."""
    if decode:
        for layer in layers:
            if isinstance(layer.weight, Nf4Weight):
                y_TO = nf4_matmul(x_TI, layer.weight)
                yield y_TO if layer.bias is None else y_TO.add_(layer.bias)
            else:
                yield torch.nn.functional.linear(x_TI, layer.weight, layer.bias)
        return
    matrices = dequantize_ahead([Job(layer.weight) for layer in layers])
    for layer, matrix_OI in zip(layers, matrices, strict=True):
        yield torch.nn.functional.linear(x_TI, matrix_OI, layer.bias)


def add_adapter(y_TO: Tensor, low_TR: Tensor, layer: LoraLinear, span: slice) -> None:
    """``y += scale (x A^T) B^T``, with ``low = x A^T`` of the stack."""
    if layer.lora_b is not None:
        b_OR = layer.lora_b.detach().to(y_TO.dtype)
        y_TO.addmm_(low_TR[:, span], b_OR.t(), alpha=layer.scale)


def project(
    wide_TI: Tensor, matrix_OI: Tensor, layer: LoraLinear, span: slice, out_TO: Tensor
) -> None:
    """The whole layer, from an input that carries ``x A^T`` of the stack behind x."""
    into = layer.weight.shape[1]
    room = wide_TI.shape[1] - into
    if room and isinstance(layer.weight, Nf4Weight):
        matrix_OI[:, into:].zero_()
        if layer.lora_b is not None:
            matrix_OI[:, into:][:, span].copy_(layer.lora_b.detach() * layer.scale)
        _multiply(wide_TI, matrix_OI.t(), layer.bias, out_TO)
        return
    _multiply(wide_TI[:, :into], matrix_OI.t(), layer.bias, out_TO)
    add_adapter(out_TO, wide_TI[:, into:], layer, span)


def project_back(
    wide_TO: Tensor, matrix_OI: Tensor, layer: LoraLinear, a_RI: Tensor | None, out_TI: Tensor,
    accumulate: bool,
) -> None:  # fmt: skip
    """``dy W + low A``, from a dy that carries ``low`` behind it; added to ``out`` or put there."""
    out = layer.weight.shape[0]
    beta = 1.0 if accumulate else 0.0
    if a_RI is None or isinstance(layer.weight, Nf4Weight):
        if a_RI is not None:
            matrix_OI[out:].copy_(a_RI)
        torch.addmm(out_TI, wide_TO, matrix_OI, beta=beta, out=out_TI)
        return
    torch.addmm(out_TI, wide_TO[:, :out], matrix_OI, beta=beta, out=out_TI)
    out_TI.addmm_(wide_TO[:, out:], a_RI)


def widen(x_TI: Tensor, stacked: Stack | None) -> Tensor:
    """x with ``x A^T`` of the stack behind it."""
    if stacked is None:
        return x_TI
    into = x_TI.shape[1]
    wide_TI = x_TI.new_empty(x_TI.shape[0], into + stacked.a_RI.shape[0])
    wide_TI[:, :into].copy_(x_TI)
    torch.mm(x_TI, stacked.a_RI.t(), out=wide_TI[:, into:])
    return wide_TI


def lower(low_TR: Tensor, grad_TO: Tensor, layer: LoraLinear, span: slice) -> None:
    """``low = scale dy B``, the gradient of ``x A^T``, to the layer's columns."""
    if layer.lora_b is not None:
        b_OR = layer.lora_b.detach().to(grad_TO.dtype)
        torch.addmm(
            low_TR[:, span], grad_TO, b_OR, beta=0.0, alpha=layer.scale, out=low_TR[:, span]
        )


def gradients(
    layer: LoraLinear, span: slice, grad_a_RI: Tensor | None, grad_TO: Tensor, low_TR: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Of A, which is the layer's part of the stack's, and ``dB = scale dy^T (x A^T)``."""
    if layer.lora_a is None or layer.lora_b is None:
        return None, None
    assert grad_a_RI is not None
    grad_b_OR = gram(grad_TO, low_TR[:, span]).mul_(layer.scale)
    return grad_a_RI[span].to(layer.lora_a.dtype), grad_b_OR.to(layer.lora_b.dtype)


def gram(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """``left^T right`` in float32: a sum over all tokens."""
    if left_TM.dtype == torch.float32:
        return left_TM.t() @ right_TN
    if left_TM.is_cuda:
        return torch.mm(left_TM.t(), right_TN, out_dtype=torch.float32)
    return left_TM.float().t() @ right_TN.float()


def _multiply(x_TI: Tensor, matrix_IO: Tensor, bias_O: Tensor | None, out_TO: Tensor) -> None:
    if bias_O is None:
        torch.mm(x_TI, matrix_IO, out=out_TO)
    else:
        torch.addmm(bias_O, x_TI, matrix_IO, out=out_TO)
