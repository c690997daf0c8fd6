"""Merge of two attentions, and addition of rows, in Triton: one program a row, written in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.device import next_power_of_2, on_device_of

WARPS = 4
"""A row of 4096 16-bit numbers is 16 bytes a thread, twice."""


def merge(
    out_THD: Tensor, sums_HT: Tensor, other_THD: Tensor, other_sums_HT: Tensor, rows_N: Tensor
) -> None:
    """Write the merged rows into ``out_THD`` and ``sums_HT``."""
    if rows_N.numel() == 0:
        return
    heads, width = out_THD.shape[1:]
    with on_device_of(out_THD):
        _merge_kernel[(rows_N.numel(),)](
            out_THD,
            out_THD.stride(0),
            sums_HT,
            sums_HT.stride(0),
            other_THD,
            other_THD.stride(0),
            other_sums_HT,
            other_sums_HT.stride(0),
            rows_N,
            heads,
            width,
            HEADS=next_power_of_2(heads),
            WIDTH=next_power_of_2(width),
            num_warps=WARPS,
        )


def add_rows(target: Tensor, rows_N: Tensor, source: Tensor, from_N: Tensor | None) -> None:
    """Add rows of ``source`` to the rows ``rows_N`` of ``target``."""
    if rows_N.numel() == 0:
        return
    width = target[0].numel()
    with on_device_of(target):
        _add_kernel[(rows_N.numel(),)](
            target,
            target.stride(0),
            rows_N,
            source,
            source.stride(0),
            from_N,
            width,
            WIDTH=next_power_of_2(width),
            num_warps=WARPS,
        )


# Streams of all lengths take one compiled kernel.
@triton.jit(
    do_not_specialize=["sums_stride", "other_sums_stride"], do_not_specialize_on_alignment=["sums"]
)  # type: ignore[untyped-decorator]
def _merge_kernel(
    out: tl.tensor,
    out_stride: tl.tensor,
    sums: tl.tensor,
    sums_stride: tl.tensor,
    other: tl.tensor,
    other_stride: tl.tensor,
    other_sums: tl.tensor,
    other_sums_stride: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    head = tl.arange(0, HEADS)
    column = tl.arange(0, WIDTH)
    real = head < heads
    place = sums + head.to(tl.int64) * sums_stride + row
    first = tl.load(place, mask=real, other=0.0)
    second = tl.load(other_sums + head.to(tl.int64) * other_sums_stride + row, mask=real, other=0.0)
    most = tl.maximum(first, second)
    total = most + tl.log(tl.exp(first - most) + tl.exp(second - most))
    inside = real[:, None] & (column < width)[None, :]
    within = head[:, None] * width + column[None, :]
    a = tl.load(out + row * out_stride + within, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(other + row * other_stride + within, mask=inside, other=0.0).to(tl.float32)
    merged = tl.exp(first - total)[:, None] * a + tl.exp(second - total)[:, None] * b
    tl.store(out + row * out_stride + within, merged.to(out.dtype.element_ty), mask=inside)
    tl.store(place, total, mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _add_kernel(
    target: tl.tensor,
    target_stride: tl.tensor,
    rows: tl.tensor,
    source: tl.tensor,
    source_stride: tl.tensor,
    places: tl.tensor,
    width: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    n = tl.program_id(0)
    to = tl.load(rows + n).to(tl.int64) * target_stride
    row = n.to(tl.int64) if places is None else tl.load(places + n).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    added = tl.load(source + row * source_stride + column, mask=inside, other=0.0)
    before = tl.load(target + to + column, mask=inside, other=0.0)
    total = before.to(tl.float32) + added.to(tl.float32)
    tl.store(target + to + column, total.to(target.dtype.element_ty), mask=inside)
