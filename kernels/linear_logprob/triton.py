"""The row pass of linear_logprob in Triton: statistics, then the gradient's direction in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 8  # the fastest of BLOCK 4096-32768 and 8-32 warps on an H200: 3.7 TB/s


def row_pass(
    logits_RV: Tensor,
    target_R: Tensor,
    stats_4R: Tensor,
    slope: float,
    ceiling: float | None,
    direction_dtype: torch.dtype | None,
) -> Tensor:
    """What ``op.row_pass_torch`` does, on a GPU or in Triton's interpreter.

    The direction is a view of the logits' own storage in ``direction_dtype``. None leaves it out.
    """
    rows, vocabulary = logits_RV.shape
    shared = (target_R, stats_4R, stats_4R.stride(0), slope, ceiling or 1.0)
    options = {
        "VOCABULARY": vocabulary,
        "BLOCK": min(BLOCK, triton.next_power_of_2(vocabulary)),
        "SOFTCAP": ceiling is not None,
        "num_warps": WARPS,
    }
    # Triton launches on the current device.
    with torch.cuda.device_of(logits_RV):  # type: ignore[no-untyped-call]
        # Two kernels, not one: with and without gradient the statistics must be bitwise the same,
        # and one kernel with a switch is compiled into two that add in different orders.
        _statistics_kernel[(rows,)](logits_RV, logits_RV.stride(0), *shared, **options)
        if direction_dtype is None:
            return logits_RV
        direction_RV = logits_RV.view(direction_dtype)[:, :vocabulary]
        _direction_kernel[(rows,)](
            logits_RV,
            logits_RV.stride(0),
            direction_RV,
            direction_RV.stride(0),
            *shared,
            **options,
        )
    return direction_RV


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(
    raw: tl.tensor, slope: tl.tensor, ceiling: tl.tensor, SOFTCAP: tl.constexpr
) -> tl.tensor:
    z = raw * slope
    if SOFTCAP:
        z = ceiling * (2.0 * tl.sigmoid(2.0 * z / ceiling) - 1.0)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _statistics_kernel(
    logits_ptr: tl.tensor,
    logits_stride: tl.tensor,
    target_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    stats_stride: tl.tensor,
    slope: tl.tensor,
    ceiling: tl.tensor,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> None:
    FLOOR: tl.constexpr = -3.0e38  # finite: exp gives 0, and 0 * FLOOR is 0 where 0 * -inf is NaN
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * logits_stride
    target = tl.load(target_ptr + row)
    top = FLOOR
    total = 0.0
    weighted = 0.0
    for start in range(0, VOCABULARY, BLOCK):
        column = start + tl.arange(0, BLOCK)
        raw = tl.load(logits_ptr + column, mask=column < VOCABULARY, other=0.0)
        z = _scaled(raw, slope, ceiling, SOFTCAP)
        z = tl.where((column < VOCABULARY) & (column != target), z, FLOOR)
        new_top = tl.maximum(top, tl.max(z, axis=0))
        shrink = tl.exp(top - new_top)
        e = tl.exp(z - new_top)
        weighted = shrink * (weighted + (top - new_top) * total)
        weighted += tl.sum(e * (z - new_top), axis=0)
        total = shrink * total + tl.sum(e, axis=0)
        top = new_top
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + stats_stride + row, total)
    tl.store(stats_ptr + 2 * stats_stride + row, weighted / total)
    z_target = _scaled(tl.load(logits_ptr + target), slope, ceiling, SOFTCAP)
    tl.store(stats_ptr + 3 * stats_stride + row, z_target)


@triton.jit  # type: ignore[untyped-decorator]
def _direction_kernel(
    logits_ptr: tl.tensor,
    logits_stride: tl.tensor,
    direction_ptr: tl.tensor,
    direction_stride: tl.tensor,
    target_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    stats_stride: tl.tensor,
    slope: tl.tensor,
    ceiling: tl.tensor,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * logits_stride
    direction_ptr += row.to(tl.int64) * direction_stride
    target = tl.load(target_ptr + row)
    top = tl.load(stats_ptr + row)
    total = tl.load(stats_ptr + stats_stride + row)
    for start in range(0, VOCABULARY, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < VOCABULARY
        raw = tl.load(logits_ptr + column, mask=inside, other=0.0)
        z = _scaled(raw, slope, ceiling, SOFTCAP)
        direction = tl.where(column == target, -1.0, tl.exp(z - top) / total)
        if SOFTCAP:
            direction *= 1.0 - (z / ceiling) * (z / ceiling)
        # A 16-bit block lands on logits of this or an earlier block: all warps must have read.
        tl.debug_barrier()
        direction = direction.to(direction_ptr.dtype.element_ty)
        tl.store(direction_ptr + column, direction, mask=inside)
