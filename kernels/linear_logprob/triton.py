"""The fused forward of linear_logprob: logits never leave the registers of their tile.

The kernel is a persistent matrix product ``hidden @ weight.T``. Its epilogue turns float32 logits
into odds against the target, ``exp(z_v - z_target)``, stores them as bfloat16 for the gradient's
product, and writes three float32 partial sums per row and tile. No logit is ever rounded to 16 bits
or written, and a row needs no second pass, since odds need no maximum. A tile with odds above
``2**LIMIT`` (a target of log-probability -60 or less) divides them by its own largest and stores
the exponent; ``_rows_kernel`` then brings such rows to one scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlsloth.kernels.linear_logprob.tiles import Tile, processors, tile_of

LOG2E = tl.constexpr(1.4426950408889634)
LIMIT = tl.constexpr(86.0)  # odds up to 2**86 are summed unscaled: V * 2**86 is far below 2**127
HIDDEN_BLOCK = 1024
SCALE_BLOCK = 4096  # 16 elements per thread: two loads of 16 bytes in flight
SCALE_PROGRAMS = 8  # per multiprocessor, of 8 warps each: the most it holds


def odds(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    odds_RV: Tensor,
    stats_4R: Tensor,
    slope: float,
    ceiling: float | None,
    tile: Tile | None = None,
) -> None:
    """Compute ``odds.odds_torch`` for bfloat16 inputs whose rows are multiples of 16 bytes.

    Writes ``odds_RV`` [R, V] bfloat16 (its rows 16-byte aligned) and ``stats_4R``.
    """
    rows, width = hidden_RH.shape
    vocabulary = weight_VH.shape[0]
    tile = tile or tile_of(hidden_RH.device)
    tiles = triton.cdiv(vocabulary, tile.columns)
    partial_3RT = hidden_RH.new_empty(3, rows, tiles, dtype=torch.float32)
    # Triton launches on the current device.
    with torch.cuda.device_of(hidden_RH):  # type: ignore[no-untyped-call]
        _target_kernel[(rows,)](
            hidden_RH,
            hidden_RH.stride(0),
            weight_VH,
            weight_VH.stride(0),
            bias_V,
            target_R,
            stats_4R[3],
            slope,
            ceiling or 1.0,
            WIDTH=width,
            BLOCK=min(HIDDEN_BLOCK, triton.next_power_of_2(width)),
            SOFTCAP=ceiling is not None,
            num_warps=4,
        )
        row_tiles = triton.cdiv(rows, tile.rows)
        # Groups of about equal size: a last group of one tile would read the whole weight for few
        # rows.
        row_group = triton.cdiv(row_tiles, triton.cdiv(row_tiles, tile.row_group))
        programs = min(processors(hidden_RH.device), row_tiles * tiles)
        _odds_kernel[(programs,)](
            TensorDescriptor.from_tensor(hidden_RH, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(weight_VH, [tile.columns, tile.depth]),
            TensorDescriptor.from_tensor(odds_RV, [tile.rows, tile.columns]),
            bias_V,
            target_R,
            stats_4R[3],
            partial_3RT,
            rows,
            vocabulary,
            width,
            tiles,
            row_group,
            programs,
            slope,
            ceiling or 1.0,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            SOFTCAP=ceiling is not None,
            INTERPRETED=not hidden_RH.is_cuda,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        _rows_kernel[(rows,)](
            partial_3RT,
            partial_3RT.stride(0),
            tiles,
            odds_RV,
            odds_RV.stride(0),
            stats_4R,
            stats_4R.stride(0),
            vocabulary,
            TILES=triton.next_power_of_2(tiles),
            COLUMNS=tile.columns,
            num_warps=4,
        )


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
    with torch.cuda.device_of(sum_RH):  # type: ignore[no-untyped-call]
        _finish_kernel[(rows, triton.cdiv(width, HIDDEN_BLOCK))](
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
    with torch.cuda.device_of(tensor_RH):  # type: ignore[no-untyped-call]
        _scale_kernel[(rows, triton.cdiv(width, HIDDEN_BLOCK))](
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
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        _scale_all_kernel[(min(triton.cdiv(count, SCALE_BLOCK), most),)](
            tensor, factor, count, BLOCK=SCALE_BLOCK, num_warps=8
        )


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(
    raw: tl.tensor, slope: tl.tensor, ceiling: tl.tensor, SOFTCAP: tl.constexpr
) -> tl.tensor:
    z = raw * slope
    if SOFTCAP:
        z = ceiling * (2.0 * tl.sigmoid(2.0 * z / ceiling) - 1.0)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _target_kernel(
    hidden_ptr: tl.tensor,
    hidden_stride: tl.tensor,
    weight_ptr: tl.tensor,
    weight_stride: tl.tensor,
    bias_ptr: tl.tensor,
    target_ptr: tl.tensor,
    out_ptr: tl.tensor,
    slope: tl.tensor,
    ceiling: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    hidden_ptr += row.to(tl.int64) * hidden_stride
    weight_ptr += target * weight_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        hidden = tl.load(hidden_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        total += hidden * weight
    raw = tl.sum(total, axis=0)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + target).to(tl.float32)
    tl.store(out_ptr + row, _scaled(raw, slope, ceiling, SOFTCAP))


@triton.jit(do_not_specialize=["rows", "row_group", "programs"])  # type: ignore[untyped-decorator]
def _odds_kernel(
    hidden_desc: tl.tensor,
    weight_desc: tl.tensor,
    odds_desc: tl.tensor,
    bias_ptr: tl.tensor,
    target_ptr: tl.tensor,
    target_logit_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: tl.tensor,
    vocabulary: tl.tensor,
    width: tl.tensor,
    column_tiles: tl.tensor,
    row_group: tl.tensor,
    programs: tl.tensor,
    slope: tl.tensor,
    ceiling: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    EXCLUDED: tl.constexpr = -1.0e30  # finite: exp2 gives 0, and 0 * EXCLUDED is 0
    row_tiles = tl.cdiv(rows, ROWS)
    plane = rows.to(tl.int64) * column_tiles
    for index in range(tl.program_id(0), row_tiles * column_tiles, programs):
        # Within a group of row tiles, rows run fastest: they share columns of the weight in L2 and
        # stay there themselves. Only the last group may be smaller.
        first = index // (row_group * column_tiles) * row_group
        size = tl.minimum(row_tiles - first, row_group)
        within = index - first * column_tiles
        row_tile = first + within % size
        column_tile = within // size
        logits = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, width, DEPTH):
            hidden = hidden_desc.load([row_tile * ROWS, start])
            weight = weight_desc.load([column_tile * COLUMNS, start])
            if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as integers
                hidden = hidden.to(tl.float32)
                weight = weight.to(tl.float32)
            logits = tl.dot(hidden, weight.T, logits)
        row = row_tile * ROWS + tl.arange(0, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = row < rows
        target = tl.load(target_ptr + row, mask=inside, other=-1).to(tl.int32)
        reference = tl.load(target_logit_ptr + row, mask=inside, other=0.0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=column < vocabulary, other=0.0)
            logits += bias.to(tl.float32)[None, :]
        # Exponents of 2, one multiply-add each: power = value * factor - reference.
        if SOFTCAP:
            z = _scaled(logits, slope, ceiling, SOFTCAP)
            value = z
            factor = LOG2E
        else:
            value = logits
            factor = slope * LOG2E
            if slope < 0.0:  # so that the largest value has the largest power
                value = -logits
                factor = -factor
        # Few tiles hold a target or the vocabulary's end: all others skip the comparisons, a third
        # of the instructions after a tile's product.
        start = column_tile * COLUMNS
        holds_target = (target >= start) & (target < start + COLUMNS)
        if (tl.max(holds_target.to(tl.int32), axis=0) == 1) | (start + COLUMNS > vocabulary):
            left_out = (column[None, :] == target[:, None]) | (column >= vocabulary)[None, :]
            value = tl.where(left_out, EXCLUDED, value)
        reference *= LOG2E
        top = tl.max(value, axis=1) * factor - reference
        shift = tl.where(top > LIMIT, top, 0.0)
        power = value * factor - (reference + shift)[:, None]
        odds = tl.exp2(power)
        partial = partial_ptr + row.to(tl.int64) * column_tiles + column_tile
        tl.store(partial, shift, mask=inside)
        tl.store(partial + plane, tl.sum(odds, axis=1), mask=inside)
        tl.store(partial + 2 * plane, tl.sum(odds * power, axis=1), mask=inside)
        if SOFTCAP:
            odds *= 1.0 - (z / ceiling) * (z / ceiling)
        odds_desc.store([row_tile * ROWS, column_tile * COLUMNS], odds.to(odds_desc.dtype))


@triton.jit(do_not_specialize=["plane", "stats_stride"])  # type: ignore[untyped-decorator]
def _rows_kernel(
    partial_ptr: tl.tensor,
    plane: tl.tensor,
    tiles: tl.tensor,
    odds_ptr: tl.tensor,
    odds_stride: tl.tensor,
    stats_ptr: tl.tensor,
    stats_stride: tl.tensor,
    vocabulary: tl.tensor,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    TINY: tl.constexpr = 1.0e-38  # if all odds underflow: log-prob -1e-38, gradient 0
    row = tl.program_id(0)
    partial_ptr += row.to(tl.int64) * tiles
    tile = tl.arange(0, TILES)
    shift = tl.load(partial_ptr + tile, mask=tile < tiles, other=0.0)
    total = tl.load(partial_ptr + plane + tile, mask=tile < tiles, other=0.0)
    weighted = tl.load(partial_ptr + 2 * plane + tile, mask=tile < tiles, other=0.0)
    last = tl.max(shift, axis=0)
    if tl.max(tl.where((tile < tiles) & (shift != last), 1, 0), axis=0) == 1:
        odds_ptr += row.to(tl.int64) * odds_stride
        for index in range(tiles):
            factor = tl.exp2(tl.load(partial_ptr + index) - last)
            column = index * COLUMNS + tl.arange(0, COLUMNS)
            odds = tl.load(odds_ptr + column, mask=column < vocabulary, other=0.0)
            odds = (odds.to(tl.float32) * factor).to(odds_ptr.dtype.element_ty)
            tl.store(odds_ptr + column, odds, mask=column < vocabulary)
    factor = tl.exp2(shift - last)
    weighted = tl.sum(factor * (weighted + (shift - last) * total), axis=0)
    total = tl.sum(factor * total, axis=0)
    total = tl.maximum(total, TINY, propagate_nan=tl.PropagateNan.ALL)
    reference = tl.load(stats_ptr + 3 * stats_stride + row)
    tl.store(stats_ptr + row, reference + last / LOG2E)
    tl.store(stats_ptr + stats_stride + row, total)
    tl.store(stats_ptr + 2 * stats_stride + row, weighted / total / LOG2E)


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
