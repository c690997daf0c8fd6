"""Triton kernel of ``out = base + low @ factor``, in one pass over a wide tensor."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.device import cdiv, next_power_of_2, on_device_of

TOKENS, COLUMNS, WARPS = 64, 128, 4
LEAST_RANK = 16  # the least rank that tensor cores take


def add_product(base_TN: Tensor, low_TR: Tensor, factor_RN: Tensor, out_TN: Tensor) -> None:
    """Write ``base + low @ factor`` to out in 16 bits, summed in float32 and rounded once.

    ``out`` may be ``base``. cuBLAS takes 1.5 times as long: its product of so few terms waits for
    each tile of ``base``.
    """
    (tokens, width), rank = base_TN.shape, low_TR.shape[1]
    if base_TN.numel() == 0:
        return
    # Triton launches on the current device.
    with on_device_of(base_TN):
        _kernel[(cdiv(width, COLUMNS) * cdiv(tokens, TOKENS),)](
            base_TN, base_TN.stride(0),
            low_TR, low_TR.stride(0),
            factor_RN, *factor_RN.stride(),
            out_TN, out_TN.stride(0),
            tokens, width, rank,
            RANK=max(LEAST_RANK, next_power_of_2(rank)),
            TOKENS=TOKENS,
            COLUMNS=COLUMNS,
            INTERPRETED=os.environ.get("TRITON_INTERPRET") == "1",
            num_warps=WARPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _kernel(
    base_ptr: tl.tensor, base_stride: tl.tensor,
    low_ptr: tl.tensor, low_stride: tl.tensor,
    factor_ptr: tl.tensor, factor_row: tl.tensor, factor_column: tl.tensor,
    out_ptr: tl.tensor, out_stride: tl.tensor,
    tokens: tl.tensor, width: tl.tensor, total_rank: tl.tensor,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    token = tl.program_id(0) // across * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    row = token.to(tl.int64)[:, None]
    live, within = (token < tokens)[:, None], (column < width)[None, :]
    base = tl.load(base_ptr + row * base_stride + column[None, :], mask=live & within, other=0.0)
    rank = tl.arange(0, RANK)
    low = tl.load(
        low_ptr + row * low_stride + rank[None, :],
        mask=live & (rank < total_rank)[None, :], other=0.0,
    )  # fmt: skip
    factor = tl.load(
        factor_ptr + rank[:, None] * factor_row + column[None, :] * factor_column,
        mask=(rank < total_rank)[:, None] & within, other=0.0,
    )  # fmt: skip
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as integers
        low, factor = low.to(tl.float32), factor.to(tl.float32)
    total = tl.dot(low, factor, base.to(tl.float32))
    tl.debug_barrier()
    place = out_ptr + row * out_stride + column[None, :]
    tl.store(place, total.to(base.dtype), mask=live & within)
