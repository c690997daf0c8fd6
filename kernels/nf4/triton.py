"""Product with an NF4 weight in Triton, which decodes the weight inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.device import cdiv, on_device_of
from rlsloth.kernels.nf4 import ptx
from rlsloth.kernels.nf4.plan import BLOCK_O, gpu_of, plan
from rlsloth.kernels.nf4.triton_dequantize import INTERPRETED, scales_of

if TYPE_CHECKING:
    from rlsloth.kernels.nf4.op import Nf4Weight

FILL = tl.constexpr(ptx.FILL)
LOOK_UP, MEANING = tl.constexpr(ptx.LOOK_UP), tl.constexpr(ptx.MEANING)
UNSCALE = tl.constexpr(1.0 / ptx.SCALE)

REDUCED = 1024  # sums that each program adds up
WARPS = 8  # FILL needs 256 threads
REGISTERS = 248  # per thread: each program has a whole multiprocessor


def matmul(x_MI: Tensor, weight: Nf4Weight, pairs: Tensor) -> Tensor:
    """Compute ``op.nf4_matmul`` for bfloat16 and a weight that ``op`` has checked."""
    (rows, columns), out = x_MI.shape, weight.shape[0]
    cut = plan(rows, out, columns // 64, gpu_of(x_MI.device))
    y_MO = x_MI.new_empty(rows, out)
    sums_SMO = y_MO[None]
    if cut.splits > 1:
        sums_SMO = x_MI.new_empty(cut.splits, rows, out, dtype=torch.float32)
    absmax, *scales = scales_of(weight, pairs)  # FILL reads 256 words of scales[0], nested or not
    nested = weight.code_256 is not None
    grid = (cdiv(out, BLOCK_O), cdiv(rows, cut.block_m), cut.splits)
    with on_device_of(x_MI):
        _matmul_kernel[grid](
            x_MI,
            weight.packed_B.view(torch.int32),
            absmax.view(torch.int32) if nested else absmax,
            *scales,
            pairs,
            sums_SMO,
            rows,
            out,
            I=columns,
            BLOCK_M=cut.block_m,
            BLOCK_O=BLOCK_O,
            STEPS=cut.steps,
            UNROLL=cut.unroll,
            STAGES=cut.stages,
            NESTED=nested,
            STACKED=weight.stacked,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
        if cut.splits > 1:
            _reduce_kernel[(cdiv(rows * out, REDUCED),)](
                sums_SMO, y_MO, rows * out, SPLITS=cut.splits, BLOCK=REDUCED
            )
    return y_MO


@triton.jit  # type: ignore[untyped-decorator]
def _filled(pairs_ptr: tl.tensor, code_ptr: tl.tensor) -> tl.tensor:
    """Fill the table in shared memory; return the start of this lane's copy."""
    if INTERPRETED:
        return 0
    return tl.inline_asm_elementwise(
        FILL,
        "=r,l,l",
        [pairs_ptr.to(tl.uint64), code_ptr.to(tl.uint64)],
        dtype=tl.uint32,
        is_pure=False,
        pack=1,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _decoded(words: tl.tensor, pairs_ptr: tl.tensor, table: tl.tensor) -> tl.tensor:
    """Decode the 8 words in each row to 64 values times SCALE, in bfloat16."""
    place = tl.arange(0, 4)[None, None, :]
    if INTERPRETED:
        pair = tl.load(pairs_ptr + ((words[:, :, None] >> (8 * place)) & 255))
        high = (pair << 16).to(tl.float32, bitcast=True)
        low = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        # Each of four lanes reads the whole words and takes its own byte, the layout of mma.
        words, place = tl.broadcast(words[:, :, None], 0x4440 + place)
        pair = tl.inline_asm_elementwise(
            LOOK_UP, "=r,r,r,r", [words, place, table], dtype=tl.uint32, is_pure=True, pack=1
        )
        high = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        low = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(high, low), (words.shape[0], 64))


@triton.jit  # type: ignore[untyped-decorator]
def _meaning(
    row: tl.tensor,
    column: tl.tensor,
    words_ptr: tl.tensor,
    code_ptr: tl.tensor,
    table: tl.tensor,
    BLOCKS: tl.constexpr,
) -> tl.tensor:
    """Return an absmax code's value for each row of the weight, whose first block is ``row``."""
    # Four codes per load: the least that cp.async, which loads turns ahead, can take.
    if BLOCKS % 4 == 0:  # the same place in the word for all rows
        codes = tl.load(words_ptr + row // 4 + column // 4) >> (column % 4 * 8) & 255
    else:
        block = row + column
        codes = tl.load(words_ptr + block // 4) >> (block % 4 * 8) & 255
    if INTERPRETED:
        return tl.load(code_ptr + codes)
    return tl.inline_asm_elementwise(
        MEANING, "=f,r,r", [codes, table], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _matmul_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    code_ptr: tl.tensor,
    absmax2_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    NESTED: tl.constexpr,
    STACKED: tl.constexpr,
) -> None:
    """Compute one split of ``W @ x.T`` for a tile of O and M."""
    BLOCKS: tl.constexpr = I // 64
    table = _filled(pairs_ptr, code_ptr)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(2) * STEPS
    o_read = tl.minimum(o, out - 1)  # rows past the end repeat the last one: no mask on loads
    x_ptrs = x_ptr + tl.minimum(m, rows - 1)[None, :] * I + tl.arange(0, 64)[:, None]
    word_ptrs = words_ptr + o_read[:, None].to(tl.int64) * (I // 8) + tl.arange(0, 8)[None, :]
    row = o_read * BLOCKS
    if NESTED:
        # Up to MAX_STEPS blocks of a row need at most two absmax2.
        first = (row + begin) // 256
        last = (row + tl.minimum(begin + STEPS, BLOCKS) - 1) // 256
        change = first * 256 + 256 - row
        outer0 = tl.load(absmax2_ptr + first) * UNSCALE
        outer1 = tl.load(absmax2_ptr + last) * UNSCALE
        offset = tl.load(offset_ptr + o_read if STACKED else offset_ptr) * UNSCALE
    sums = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for turn in tl.range(0, STEPS // UNROLL, num_stages=STAGES):
        for j in tl.static_range(UNROLL):
            index = begin + turn * UNROLL + j
            column = tl.minimum(index, BLOCKS - 1)
            x = tl.load(x_ptrs + column * 64)
            if NESTED:
                code = _meaning(row, column, absmax_ptr, code_ptr, table, BLOCKS)
                scale = code * tl.where(column < change, outer0, outer1) + offset
            else:
                scale = tl.load(absmax_ptr + row + column) * UNSCALE
            if BLOCKS % STEPS != 0:
                scale = tl.where(index < BLOCKS, scale, 0.0)
            weight = _decoded(tl.load(word_ptrs + column * 8), pairs_ptr, table)
            # Tensor cores take the left factor from registers, decoded in their layout. Scaling
            # waits for the dot: one that added to ``sums`` itself would still run while the next
            # block is decoded into its registers (triton issue 9433).
            sums += tl.dot(weight, x.to(weight.dtype)) * scale[:, None]
    place = (tl.program_id(2) * rows + m)[None, :].to(tl.int64) * out + o[:, None]
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
