"""The matrix products of the LoRA ops.

A product with a dequantised weight includes the adapter, as a few more rows or columns of the
matrix (``nf4.ahead.Job``): it returns ``x A^T`` in the columns after y, or takes ``low`` in the
columns after x. Separate products would read or write a wide tensor once more. A plain weight's
matrix has no room for the adapter, so there they are separate.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rlsloth.kernels.device import multiplies_in_triton
from rlsloth.kernels.lora.layer import LoraLinear, Stack
from rlsloth.kernels.nf4.op import Nf4Weight, nf4_matmul

MOST_RANK = 256  # highest rank that the fused addition takes; above it, use a plain product


def frozen(x_TI: Tensor, matrix_OI: Tensor, layer: LoraLinear) -> Tensor:
    """Return ``x W^T + bias``."""
    return torch.nn.functional.linear(x_TI, matrix_OI, layer.bias)


def decoded(x_TI: Tensor, layer: LoraLinear) -> Tensor:
    """Return ``x W^T + bias`` for a few rows, without dequantising an NF4 weight first."""
    if not isinstance(layer.weight, Nf4Weight):
        return frozen(x_TI, layer.weight, layer)
    y_TO = nf4_matmul(x_TI, layer.weight)
    return y_TO if layer.bias is None else y_TO.add_(layer.bias)


def with_low(x_TI: Tensor, matrix: Tensor, layer: LoraLinear, stacked: Stack | None) -> Tensor:
    """Return ``[x W^T + bias | x A^T]`` [T, O + R], with A of the stack.

    The matrix of an NF4 weight has A in the rows below W.
    """
    a_RI = None if stacked is None else stacked.a_RI
    wide_TO, out = _room(x_TI, layer.weight.shape[0], a_RI), layer.weight.shape[0]
    if a_RI is None:
        _multiply(x_TI, matrix.t(), layer.bias, wide_TO)
    elif isinstance(layer.weight, Nf4Weight):
        bias = layer.bias
        if bias is not None:
            bias = torch.nn.functional.pad(bias, (0, a_RI.shape[0]))
        _multiply(x_TI, matrix.t(), bias, wide_TO)
    else:
        _multiply(x_TI, matrix.t(), layer.bias, wide_TO[:, :out])
        torch.mm(x_TI, a_RI.t(), out=wide_TO[:, out:])
    return wide_TO


def from_wide(wide_TI: Tensor, matrix: Tensor, layer: LoraLinear, b_OR: Tensor | None) -> Tensor:
    """Return ``x W^T + bias + low B^T`` from the input ``[x | low]``.

    The matrix of an NF4 weight has B (times the scale, as here) in the columns after W.
    """
    out, into = layer.weight.shape
    y_TO = wide_TI.new_empty(wide_TI.shape[0], out)
    if b_OR is None or isinstance(layer.weight, Nf4Weight):
        _multiply(wide_TI, matrix.t(), layer.bias, y_TO)
    else:
        _multiply(wide_TI[:, :into], matrix.t(), layer.bias, y_TO)
        add_product(y_TO, wide_TI[:, into:], b_OR.t(), y_TO)
    return y_TO


def back_with_low(
    grad_TO: Tensor,
    matrix: Tensor,
    layer: LoraLinear,
    b_OR: Tensor | None,
    total_TI: Tensor | None = None,
) -> Tensor:
    """Return ``[dy W | dy B]`` [T, I + R], with the matrix of ``from_wide``.

    Added to ``total_TI`` in place if it is given.
    """
    into = layer.weight.shape[1]
    beta = 0.0 if total_TI is None else 1.0
    if total_TI is None:
        total_TI = _room(grad_TO, into, None if b_OR is None else b_OR.t())
    parts = [(matrix, total_TI)]
    if b_OR is not None and not isinstance(layer.weight, Nf4Weight):
        parts = [(matrix, total_TI[:, :into]), (b_OR, total_TI[:, into:])]
    for factor, part_TN in parts:
        torch.addmm(part_TN, grad_TO, factor, beta=beta, out=part_TN)
    return total_TI


def back_from_wide(
    wide_TO: Tensor, matrix: Tensor, layer: LoraLinear, stacked: Stack | None
) -> Tensor:
    """Return ``dy W + low A`` from ``[dy | low]``, with the matrix of ``with_low``."""
    out = layer.weight.shape[0]
    if stacked is None or isinstance(layer.weight, Nf4Weight):
        return wide_TO @ matrix
    grad_TI = wide_TO[:, :out] @ matrix
    add_product(grad_TI, wide_TO[:, out:], stacked.a_RI, grad_TI)
    return grad_TI


def add_product(base_TN: Tensor, low_TR: Tensor, factor_RN: Tensor, out_TN: Tensor) -> None:
    """Write ``base + low @ factor`` to out, rounded once; out may be base."""
    # TRITON_INTERPRET is Triton's own switch: kernels then run on CPU tensors.
    runs = base_TN.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    runs = runs and multiplies_in_triton(base_TN)
    if runs and base_TN.dtype != torch.float32 and low_TR.shape[1] <= MOST_RANK:
        from rlsloth.kernels.lora import triton

        triton.add_product(base_TN, low_TR, factor_RN, out_TN)
    else:
        torch.addmm(base_TN, low_TR, factor_RN, out=out_TN)


def _room(like_TN: Tensor, width: int, more_RN: Tensor | None) -> Tensor:
    more = 0 if more_RN is None else more_RN.shape[0]
    return like_TN.new_empty(like_TN.shape[0], width + more)


def _multiply(x_TI: Tensor, matrix_IO: Tensor, bias_O: Tensor | None, out_TO: Tensor) -> None:
    if bias_O is None:
        torch.mm(x_TI, matrix_IO, out=out_TO)
    else:
        torch.addmm(bias_O, x_TI, matrix_IO, out=out_TO)
