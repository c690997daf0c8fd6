"""Matrix products of linear_logprob: 16- or 32-bit inputs, every sum in float32."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ROWS = 8192  # rows of the weight that a CPU upcasts and multiplies at a time


def project(hidden_RH: Tensor, weight_VH: Tensor, out_RV: Tensor) -> None:
    """Write ``hidden @ weight.T`` in float32: 16-bit logits move a policy ratio by several %."""
    if hidden_RH.dtype == torch.float32:
        torch.mm(hidden_RH, weight_VH.t(), out=out_RV)
    elif hidden_RH.is_cuda:
        torch.mm(hidden_RH, weight_VH.t(), out_dtype=torch.float32, out=out_RV)
    else:
        hidden_RH = hidden_RH.float()
        for block in _blocks(weight_VH):
            torch.mm(hidden_RH, weight_VH[block].float().t(), out=out_RV[:, block])


def multiply(odds_RV: Tensor, weight_VH: Tensor) -> Tensor:
    """Return ``odds @ weight``, [R, H] float32."""
    if not weight_VH.is_cuda:
        # Block by block also in float32: for few rows, CPU libraries add one term after another,
        # which is off by 1e-4 at V = 150,000.
        sum_RH = odds_RV.new_zeros(odds_RV.shape[0], weight_VH.shape[1], dtype=torch.float32)
        for block in _blocks(weight_VH):
            sum_RH += odds_RV[:, block].float() @ weight_VH[block].float()
        return sum_RH
    if weight_VH.dtype == torch.float32:
        return odds_RV @ weight_VH
    # A 16-bit result would be rounded before the target's row is subtracted, and would let cuBLAS
    # sum its splits of the vocabulary in 16 bits.
    return torch.mm(odds_RV.to(weight_VH.dtype), weight_VH, out_dtype=torch.float32)


def add_transposed(
    odds_RV: Tensor, factor_RK: Tensor, sum_VK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``sum + odds.T @ factor`` in ``dtype``, added in place if there is a sum."""
    if not odds_RV.is_cuda or odds_RV.dtype == torch.float32:
        odds_RV, factor_RK = odds_RV.float(), factor_RK.float()
        if sum_VK is None:
            return (odds_RV.t() @ factor_RK).to(dtype)
        return sum_VK.addmm_(odds_RV.t(), factor_RK)
    factor_RK = factor_RK.to(odds_RV.dtype)
    if sum_VK is not None:
        return torch.addmm(sum_VK, odds_RV.t(), factor_RK, out_dtype=torch.float32, out=sum_VK)
    if dtype == odds_RV.dtype:
        return odds_RV.t() @ factor_RK
    return torch.mm(odds_RV.t(), factor_RK, out_dtype=dtype)


def _blocks(weight_VH: Tensor) -> list[slice]:
    vocabulary = weight_VH.shape[0]
    return [slice(start, start + BLOCK_ROWS) for start in range(0, vocabulary, BLOCK_ROWS)]
