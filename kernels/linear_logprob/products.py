"""Matrix products of linear_logprob: inputs of 16 or 32 bits, every sum in float32."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ROWS = 8192  # rows of the weight that a CPU multiplies, and upcasts, at a time


def project(hidden_RH: Tensor, weight_VH: Tensor, out_RV: Tensor) -> None:
    """``hidden @ weight.T`` in float32: 16-bit logits move a policy ratio by several per cent."""
    if hidden_RH.dtype == torch.float32:
        torch.mm(hidden_RH, weight_VH.t(), out=out_RV)
    elif hidden_RH.is_cuda:
        torch.mm(hidden_RH, weight_VH.t(), out_dtype=torch.float32, out=out_RV)
    else:
        hidden_RH = hidden_RH.float()
        for block in _blocks(weight_VH):
            torch.mm(hidden_RH, weight_VH[block].float().t(), out=out_RV[:, block])


def multiply(direction_RV: Tensor, weight_VH: Tensor, out_RH: Tensor) -> None:
    """``direction @ weight``, rounded once to the output's dtype."""
    if not weight_VH.is_cuda:
        # Block by block also in float32: CPU libraries sum a product of few rows one term after the
        # other, which at V = 150,000 is off by 1e-4.
        sum_RH = torch.zeros_like(out_RH, dtype=torch.float32)
        for block in _blocks(weight_VH):
            sum_RH += direction_RV[:, block].float() @ weight_VH[block].float()
        out_RH.copy_(sum_RH)
    elif weight_VH.dtype == torch.float32:
        torch.mm(direction_RV, weight_VH, out=out_RH)
    else:
        # Asking for a 16-bit product would let cuBLAS sum its splits of the vocabulary in 16 bits.
        out_RH.copy_(torch.mm(direction_RV, weight_VH, out_dtype=torch.float32))


def accumulate(direction_RV: Tensor, factor_RK: Tensor, sum_VK: Tensor) -> None:
    """``sum += direction.T @ factor`` for float32 ``factor`` and ``sum``."""
    if direction_RV.dtype == torch.float32:
        sum_VK.addmm_(direction_RV.t(), factor_RK)
    elif direction_RV.is_cuda:
        factor_RK = factor_RK.to(direction_RV.dtype)
        torch.addmm(sum_VK, direction_RV.t(), factor_RK, out_dtype=torch.float32, out=sum_VK)
    else:
        sum_VK.addmm_(direction_RV.float().t(), factor_RK)


def _blocks(weight_VH: Tensor) -> list[slice]:
    vocabulary = weight_VH.shape[0]
    return [slice(start, start + BLOCK_ROWS) for start in range(0, vocabulary, BLOCK_ROWS)]
