"""The fused forward of linear_logprob: logits never leave the registers of their tile.

The kernel is a persistent matrix product ``hidden @ weight.T``. Its epilogue turns float32 logits
into odds against the target, ``exp(z_v - z_target)``, stores them as bfloat16 for the gradient's
product, and writes three float32 partial sums per row and tile. No logit is ever rounded to 16 bits
or written, and a row needs no second pass, since odds need no maximum. A tile with odds above
``2**LIMIT`` (a target of log-probability -60 or less) divides them by its own largest and stores
the exponent; ``join_tiles`` then brings such rows to one scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlsloth.kernels.device import cdiv, next_power_of_2, on_device_of
from rlsloth.kernels.linear_logprob.tiles import HIDDEN_BLOCK, Tile, processors, tile_of
from rlsloth.kernels.linear_logprob.triton_rows import LOG2E, join_tiles

LIMIT = tl.constexpr(86.0)  # odds up to 2**86 are summed unscaled: V * 2**86 is far below 2**127


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
    tiles = cdiv(vocabulary, tile.columns)
    partial_3RT = hidden_RH.new_empty(3, rows, tiles, dtype=torch.float32)
    # Triton launches on the current device.
    with on_device_of(hidden_RH):
        _write_target_logits(hidden_RH, weight_VH, bias_V, target_R, stats_4R[3], slope, ceiling)
        row_tiles = cdiv(rows, tile.rows)
        # Groups of about equal size: a last group of one tile would read the whole weight for few
        # rows.
        row_group = cdiv(row_tiles, cdiv(row_tiles, tile.row_group))
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
        join_tiles(partial_3RT, odds_RV, stats_4R, tile)


def _write_target_logits(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    target_R: Tensor,
    out_R: Tensor,
    slope: float,
    ceiling: float | None,
) -> None:
    """Write the targets' logits, which the odds refer to."""
    rows, width = hidden_RH.shape
    _target_kernel[(rows,)](
        hidden_RH,
        hidden_RH.stride(0),
        weight_VH,
        weight_VH.stride(0),
        bias_V,
        target_R,
        out_R,
        slope,
        ceiling or 1.0,
        WIDTH=width,
        BLOCK=min(HIDDEN_BLOCK, next_power_of_2(width)),
        SOFTCAP=ceiling is not None,
        num_warps=4,
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


@triton.jit  # type: ignore[untyped-decorator]
def _tile_at(
    index: tl.tensor, row_tiles: tl.tensor, column_tiles: tl.tensor, row_group: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Return the row tile and the column tile that a program visits at this turn.

    Within a group of row tiles, rows run fastest: they share columns of the weight in L2 and stay
    there themselves. Only the last group may be smaller.
    """
    first = index // (row_group * column_tiles) * row_group
    size = tl.minimum(row_tiles - first, row_group)
    within = index - first * column_tiles
    return first + within % size, within // size


@triton.jit  # type: ignore[untyped-decorator]
def _product(
    hidden_desc: tl.tensor,
    weight_desc: tl.tensor,
    row_tile: tl.tensor,
    column_tile: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """Return one tile of ``hidden @ weight.T``."""
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        hidden = hidden_desc.load([row_tile * ROWS, start])
        weight = weight_desc.load([column_tile * COLUMNS, start])
        if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as integers
            hidden = hidden.to(tl.float32)
            weight = weight.to(tl.float32)
        logits = tl.dot(hidden, weight.T, logits)
    return logits


@triton.jit  # type: ignore[untyped-decorator]
def _exponent(z: tl.tensor, slope: tl.tensor, SOFTCAP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return a value and a factor whose product is the exponent of 2, before the reference.

    Without a softcap z is the raw logit, and its slope is in the factor.
    """
    value = z
    factor = LOG2E
    if not SOFTCAP:
        factor = slope * LOG2E
        if slope < 0.0:  # so that the largest value has the largest power
            value = -z
            factor = -factor
    return value, factor


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
        row_tile, column_tile = _tile_at(index, row_tiles, column_tiles, row_group)
        logits = _product(
            hidden_desc, weight_desc, row_tile, column_tile, width, ROWS, COLUMNS, DEPTH,
            INTERPRETED,
        )  # fmt: skip
        row = row_tile * ROWS + tl.arange(0, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = row < rows
        target = tl.load(target_ptr + row, mask=inside, other=-1).to(tl.int32)
        reference = tl.load(target_logit_ptr + row, mask=inside, other=0.0)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=column < vocabulary, other=0.0)
            logits += bias.to(tl.float32)[None, :]
        z = _scaled(logits, slope, ceiling, SOFTCAP) if SOFTCAP else logits
        value, factor = _exponent(z, slope, SOFTCAP)
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
