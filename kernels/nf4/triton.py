"""NF4 in Triton: exact dequantisation, and the product that decodes inside."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.nf4.ptx import DECODE, EXACT, SCALE

if TYPE_CHECKING:
    from rlsloth.kernels.nf4.op import Nf4Weight

DEQUANTIZED_GROUPS = 1024  # a program's, of 8 values each
REDUCED = 1024  # sums that a program adds up

# Rows of the weight a program multiplies: 128 keep the re-reading of x, M * I for each program,
# below the traffic of the weight itself. Eight warps share them, which leaves an H100's
# multiprocessor room for two programs: one decodes while the other's tensor cores run.
BLOCK_O = 128
WARPS = 8
STAGES = 4
PROGRAMS_PER_SM = 2
MIN_STEPS = 4  # blocks of 64 columns in a split: fewer would not fill the pipeline


class Plan(NamedTuple):
    """How a product is cut: it depends on shape and device only, so sums keep their order."""

    block_m: int
    steps: int
    """Blocks of 64 columns in a split."""
    splits: int


def plan(rows: int, out: int, blocks: int, multiprocessors: int) -> Plan:
    """Enough programs for every multiprocessor, cutting the columns where the rows do not do."""
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(out, BLOCK_O)
    splits = max(1, PROGRAMS_PER_SM * multiprocessors // tiles)
    steps = min(blocks, max(MIN_STEPS, triton.cdiv(blocks, splits)))
    return Plan(block_m, steps, triton.cdiv(blocks, steps))


def dequantize(weight: Nf4Weight, table: Tensor, out_OI: Tensor) -> None:
    """What ``op.dequantize`` says, for a matrix that is not empty."""
    rows, columns = weight.shape
    with torch.cuda.device_of(out_OI):  # type: ignore[no-untyped-call]
        _dequantize_kernel[(triton.cdiv(rows * columns, 8 * DEQUANTIZED_GROUPS),)](
            weight.packed_B,
            *_scales(weight),
            table,
            out_OI,
            rows * columns,
            out_OI.stride(0),
            ROW_GROUPS=columns // 8 if columns % 8 == 0 else 0,
            SIZE=weight.blocksize,
            GROUPS=DEQUANTIZED_GROUPS,
            NESTED=weight.code_256 is not None,
            PTX="" if _interpreted() else EXACT,
            num_warps=8,
            # A fused multiply-add would round once where bitsandbytes rounds twice.
            enable_fp_fusion=False,
        )


def matmul(x_MI: Tensor, weight: Nf4Weight, table: Tensor) -> Tensor:
    """What ``op.nf4_matmul`` says, for bfloat16 and rows of whole blocks."""
    (rows, columns), out = x_MI.shape, weight.shape[0]
    blocks = columns // 64
    cut = plan(rows, out, blocks, _multiprocessors(x_MI.device))
    y_MO = x_MI.new_empty(rows, out)
    sums_SMO = y_MO[None]
    if cut.splits > 1:
        sums_SMO = x_MI.new_empty(cut.splits, rows, out, dtype=torch.float32)
    # The interpreter knows no PTX: there the same 16-bit values come from memory, in float32.
    if _interpreted():
        table = (table * SCALE).bfloat16().float()
    with torch.cuda.device_of(x_MI):  # type: ignore[no-untyped-call]
        grid = (triton.cdiv(out, BLOCK_O), triton.cdiv(rows, cut.block_m), cut.splits)
        _matmul_kernel[grid](
            x_MI,
            weight.packed_B,
            *_scales(weight),
            table,
            sums_SMO,
            rows,
            out,
            I=columns,
            BLOCK_M=cut.block_m,
            BLOCK_O=BLOCK_O,
            STEPS=cut.steps,
            STAGES=STAGES,
            NESTED=weight.code_256 is not None,
            PTX="" if _interpreted() else DECODE,
            UNSCALE=1.0 / SCALE,
            num_warps=WARPS,
        )
        if cut.splits > 1:
            _reduce_kernel[(triton.cdiv(rows * out, REDUCED),)](
                sums_SMO, y_MO, rows * out, SPLITS=cut.splits, BLOCK=REDUCED
            )
    return y_MO


def _scales(weight: Nf4Weight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if weight.code_256 is None:
        return weight.absmax, weight.absmax, weight.absmax, weight.absmax  # the last three unread
    assert weight.absmax2 is not None
    assert weight.offset is not None
    return weight.absmax, weight.code_256, weight.absmax2, weight.offset


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit  # type: ignore[untyped-decorator]
def _absmax(
    block: tl.tensor,
    absmax_ptr: tl.tensor,
    code_ptr: tl.tensor,
    absmax2_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    NESTED: tl.constexpr,
) -> tl.tensor:
    stored = tl.load(absmax_ptr + block)
    return _meant(stored, block, code_ptr, absmax2_ptr, offset_ptr, NESTED)


@triton.jit  # type: ignore[untyped-decorator]
def _meant(
    stored: tl.tensor,
    block: tl.tensor,
    code_ptr: tl.tensor,
    absmax2_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    NESTED: tl.constexpr,
) -> tl.tensor:
    """A block's absmax, from what is stored for it."""
    scale = stored
    if NESTED:
        scale = tl.load(code_ptr + stored.to(tl.int32)) * tl.load(absmax2_ptr + block // 256)
        scale += tl.load(offset_ptr)
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def _exact(
    packed: tl.tensor, table_ptr: tl.tensor, PTX: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The high and the low nibbles' values in float32."""
    if PTX == "":
        return tl.load(table_ptr + (packed >> 4)), tl.load(table_ptr + (packed & 15))
    high, low = tl.inline_asm_elementwise(
        PTX,
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
    PTX: tl.constexpr,
) -> None:
    """Groups of 8 values, one a thread: 4 bytes in, 16 bytes out, and no data changes threads."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    first = group[:, None].to(tl.int64) * 8
    # A mask by element would split a thread's one load into four.
    last = first if ROW_GROUPS else first + 2 * tl.arange(0, 4)[None, :]
    packed_ptrs = packed_ptr + first // 2 + tl.arange(0, 4)[None, :]
    packed = tl.load(packed_ptrs, mask=last < count, other=0)
    block = tl.minimum(group // (SIZE // 8), ((count - 1) // SIZE).to(tl.int32))
    scale = _absmax(block, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr, NESTED)
    high, low = _exact(packed, table_ptr, PTX)
    pairs = tl.join(high * scale[:, None], low * scale[:, None])
    values = tl.reshape(pairs, (GROUPS, 8)).to(out_ptr.dtype.element_ty)
    column = tl.arange(0, 8)[None, :]
    if ROW_GROUPS:
        place = (group // ROW_GROUPS).to(tl.int64) * out_stride + group % ROW_GROUPS * 8
    else:
        place = group.to(tl.int64) * 8
    last = first if ROW_GROUPS else first + column
    tl.store(out_ptr + place[:, None] + column, values, mask=last < count)


@triton.jit  # type: ignore[untyped-decorator]
def _decoded(
    packed: tl.tensor, table_ptr: tl.tensor, PTX: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The high and the low nibbles' values times SCALE, in bfloat16."""
    if PTX == "":
        return tl.load(table_ptr + (packed >> 4)), tl.load(table_ptr + (packed & 15))
    pair = tl.inline_asm_elementwise(
        PTX, "=r,=r,=r,=r,r", [packed], dtype=tl.uint32, is_pure=True, pack=4
    )
    high = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return high, (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _matmul_kernel(
    x_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    code_ptr: tl.tensor,
    absmax2_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    table_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    NESTED: tl.constexpr,
    PTX: tl.constexpr,
    UNSCALE: tl.constexpr,
) -> None:
    """One split of ``W @ x.T`` for a tile of O and M.

    The weight is the left factor: the tensor cores take that one from registers, where it is
    decoded, in the very layout in which they want it. One step is one quantisation block of each
    row, whose sum is scaled in float32. Rows past the end repeat the last one: no mask on loads.
    """
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    o_read = tl.minimum(o, out - 1).to(tl.int64)
    x_ptrs = x_ptr + tl.minimum(m, rows - 1)[None, :] * I + tl.arange(0, 64)[:, None]
    packed_ptrs = packed_ptr + o_read[:, None] * (I // 2) + tl.arange(0, 32)[None, :]
    sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    # A scale takes two loads, one after the other, and the compiler pipelines only what the dot
    # reads: each is asked for a step before it is needed.
    first_block = o_read * (I // 64)
    column = tl.minimum(split * STEPS, I // 64 - 1)
    next_scale = _absmax(
        first_block + column, absmax_ptr, code_ptr, absmax2_ptr, offset_ptr, NESTED
    )
    next_column = tl.minimum(split * STEPS + 1, I // 64 - 1)
    next_stored = tl.load(absmax_ptr + first_block + next_column)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        index = split * STEPS + step
        column = tl.minimum(index, I // 64 - 1)
        packed = tl.load(packed_ptrs + column * 32)
        x = tl.load(x_ptrs + column * 64)
        scale = next_scale
        if (I // 64) % STEPS != 0:
            scale = tl.where(index < I // 64, scale, 0.0)
        next_block = first_block + tl.minimum(index + 1, I // 64 - 1)
        next_scale = _meant(next_stored, next_block, code_ptr, absmax2_ptr, offset_ptr, NESTED)
        next_stored = tl.load(absmax_ptr + first_block + tl.minimum(index + 2, I // 64 - 1))
        high, low = _decoded(packed, table_ptr, PTX)
        weight = tl.reshape(tl.join(high, low), (BLOCK_O, 64))
        sums += tl.dot(weight, x.to(weight.dtype)) * (scale * UNSCALE)[:, None]
    place = (split * rows + m)[None, :].to(tl.int64) * out + o[:, None]
    inside = (m[None, :] < rows) & (o[:, None] < out)
    tl.store(sums_ptr + place, sums.to(sums_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _reduce_kernel(
    sums_ptr: tl.tensor,
    y_ptr: tl.tensor,
    count: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums_ptr + split * count.to(tl.int64) + place, mask=inside, other=0.0)
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)
