"""Lookup of rows in Triton: one program a row, which page-locked host memory may hold."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.device import next_power_of_2, on_device_of


def read_rows(table_VH: Tensor, ids_N: Tensor, out_NH: Tensor) -> None:
    """Write the rows ``ids_N`` of the table, in host memory that the GPU can address."""
    width = table_VH.shape[1]
    if ids_N.numel() == 0:
        return
    with on_device_of(out_NH):
        _rows_kernel[(ids_N.numel(),)](
            table_VH, ids_N, out_NH, width, BLOCK=next_power_of_2(width), num_warps=4
        )


@triton.jit  # type: ignore[untyped-decorator]
def _rows_kernel(
    table: tl.tensor,
    ids: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    source = tl.load(ids + row).to(tl.int64) * width
    tl.store(out + row * width + columns, tl.load(table + source + columns, mask=inside), inside)
