"""Exact dequantisation of NF4 in Triton."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.device import cdiv, on_device_of
from rlsloth.kernels.nf4 import ptx

if TYPE_CHECKING:
    from rlsloth.kernels.nf4.op import Nf4Weight

# Triton's interpreter cannot run PTX: there the same values come from memory, in float32. Triton
# decides at import whether it compiles or interprets.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
EXACT = tl.constexpr(ptx.EXACT)

DEQUANTIZED_GROUPS = 1024  # per program, of 8 values each


def dequantize(weight: Nf4Weight, table: Tensor, out_OI: Tensor) -> None:
    """Compute ``op.dequantize`` for a matrix that is not empty."""
    rows, columns = weight.shape
    with on_device_of(out_OI):
        _dequantize_kernel[(cdiv(rows * columns, 8 * DEQUANTIZED_GROUPS),)](
            weight.packed_B,
            *scales_of(weight, table),
            table,
            out_OI,
            rows * columns,
            out_OI.stride(0),
            ROW_GROUPS=columns // 8 if columns % 8 == 0 else 0,
            SIZE=weight.blocksize,
            GROUPS=DEQUANTIZED_GROUPS,
            NESTED=weight.code_256 is not None,
            ROW_BLOCKS=columns // weight.blocksize if weight.stacked else 0,
            num_warps=8,
            # A fused multiply-add would round once, while bitsandbytes rounds twice.
            enable_fp_fusion=False,
        )


def scales_of(weight: Nf4Weight, instead: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return absmax, its code, absmax2 and offset; ``instead`` of the last three if not nested."""
    if weight.code_256 is None:
        return weight.absmax, instead, instead, instead
    assert weight.absmax2 is not None
    assert weight.offset is not None
    return weight.absmax, weight.code_256, weight.absmax2, weight.offset


@triton.jit  # type: ignore[untyped-decorator]
def _absmax(
    block: tl.tensor,
    absmax_ptr: tl.tensor,
    code_ptr: tl.tensor,
    absmax2_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    NESTED: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
) -> tl.tensor:
    scale = tl.load(absmax_ptr + block)
    if NESTED:
        scale = tl.load(code_ptr + scale.to(tl.int32)) * tl.load(absmax2_ptr + block // 256)
        scale += tl.load(offset_ptr + block // ROW_BLOCKS if ROW_BLOCKS else offset_ptr)
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def _exact(packed: tl.tensor, table_ptr: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the values of the high and of the low nibbles in float32."""
    if INTERPRETED:
        return tl.load(table_ptr + (packed >> 4)), tl.load(table_ptr + (packed & 15))
    high, low = tl.inline_asm_elementwise(
        EXACT,
        "=r,=r,=r,=r,=r,=r,=r,=r,r,l,l,l,l",
        [packed, table_ptr.to(tl.uint64)],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=4,
    )
    return high, low


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_kernel(
    packed_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    code_ptr: tl.tensor,
    absmax2_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    count: tl.tensor,
    out_stride: tl.tensor,
    ROW_GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    NESTED: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
) -> None:
    """Dequantise groups of 8 values, one per thread: 4 bytes in, 16 out, none cross threads."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    first = group[:, None].to(tl.int64) * 8
    # A mask per element would split a thread's single load into four.
    last = first if ROW_GROUPS else first + 2 * tl.arange(0, 4)[None, :]
    packed_ptrs = packed_ptr + first // 2 + tl.arange(0, 4)[None, :]
    packed = tl.load(packed_ptrs, mask=last < count, other=0)
    block = tl.minimum(group // (SIZE // 8), ((count - 1) // SIZE).to(tl.int32))
    scale = _absmax(block, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr, NESTED, ROW_BLOCKS)
    high, low = _exact(packed, table_ptr)
    pairs = tl.join(high * scale[:, None], low * scale[:, None])
    values = tl.reshape(pairs, (GROUPS, 8)).to(out_ptr.dtype.element_ty)
    column = tl.arange(0, 8)[None, :]
    if ROW_GROUPS:
        place = (group // ROW_GROUPS).to(tl.int64) * out_stride + group % ROW_GROUPS * 8
    else:
        place = group.to(tl.int64) * 8
    last = first if ROW_GROUPS else first + column
    tl.store(out_ptr + place[:, None] + column, values, mask=last < count)
