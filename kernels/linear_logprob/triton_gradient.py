"""The gradient's direction in Triton: finished from the product with the odds, and scaled."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.device import cdiv, on_device_of
from rlsloth.kernels.linear_logprob.tiles import HIDDEN_BLOCK, processors

SCALE_BLOCK = 4096  # 16 elements per thread: two loads of 16 bytes in flight
SCALE_PROGRAMS = 8  # per multiprocessor, of 8 warps each: the most it holds


def finish(
    sum_RH: Tensor,
    weight_VH: Tensor,
    target_R: Tensor,
    stats_4R: Tensor,
    ceiling: float | None,
    out_RH: Tensor,
) -> None:
    """Write ``sum / total - weight[target] * cap_slope`` to out, rounded once."""
    rows, width = sum_RH.shape
    with on_device_of(sum_RH):
        _finish_kernel[(rows, cdiv(width, HIDDEN_BLOCK))](
            sum_RH,
            sum_RH.stride(0),
            weight_VH,
            weight_VH.stride(0),
            target_R,
            stats_4R,
            stats_4R.stride(0),
            out_RH,
            out_RH.stride(0),
            width,
            ceiling or 1.0,
            BLOCK=HIDDEN_BLOCK,
            SOFTCAP=ceiling is not None,
            num_warps=4,
        )


def scale_rows(tensor_RH: Tensor, scale_R: Tensor) -> None:
    """Multiply rows in place by float32 factors; torch takes four times as long for bf16."""
    rows, width = tensor_RH.shape
    if rows == 0:
        return
    with on_device_of(tensor_RH):
        _scale_kernel[(rows, cdiv(width, HIDDEN_BLOCK))](
            tensor_RH, tensor_RH.stride(0), scale_R, width, BLOCK=HIDDEN_BLOCK, num_warps=4
        )


def scale(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor in place by a float32 number on its device.

    The kernel stops at once if the number is 1, as it nearly always is; torch takes four times as
    long for bf16.
    """
    count = tensor.numel()
    if count == 0:
        return
    most = SCALE_PROGRAMS * processors(tensor.device)
    with on_device_of(tensor):
        _scale_all_kernel[(min(cdiv(count, SCALE_BLOCK), most),)](
            tensor, factor, count, BLOCK=SCALE_BLOCK, num_warps=8
        )


@triton.jit(do_not_specialize=["stats_stride"])  # type: ignore[untyped-decorator]
def _finish_kernel(
    sum_ptr: tl.tensor,
    sum_stride: tl.tensor,
    weight_ptr: tl.tensor,
    weight_stride: tl.tensor,
    target_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    stats_stride: tl.tensor,
    out_ptr: tl.tensor,
    out_stride: tl.tensor,
    width: tl.tensor,
    ceiling: tl.tensor,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    total = tl.load(stats_ptr + stats_stride + row)
    sums = tl.load(sum_ptr + row * sum_stride + column, mask=column < width, other=0.0)
    weight = tl.load(weight_ptr + target * weight_stride + column, mask=column < width, other=0.0)
    weight = weight.to(tl.float32)
    if SOFTCAP:
        z = tl.load(stats_ptr + 3 * stats_stride + row)
        weight *= 1.0 - (z / ceiling) * (z / ceiling)
    direction = sums / total - weight
    tl.store(
        out_ptr + row * out_stride + column,
        direction.to(out_ptr.dtype.element_ty),
        mask=column < width,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _scale_kernel(
    tensor_ptr: tl.tensor,
    stride: tl.tensor,
    scale_ptr: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pointer = tensor_ptr + row * stride + column
    value = tl.load(pointer, mask=column < width, other=0.0).to(tl.float32)
    value *= tl.load(scale_ptr + row)
    tl.store(pointer, value.to(tensor_ptr.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _scale_all_kernel(
    tensor_ptr: tl.tensor, factor_ptr: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr
) -> None:
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64)
        for block in range(first, tl.cdiv(count, BLOCK), tl.num_programs(0)):
            index = block * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(tensor_ptr + index, mask=index < count, other=0.0).to(tl.float32)
            value = (value * factor).to(tensor_ptr.dtype.element_ty)
            tl.store(tensor_ptr + index, value, mask=index < count)
