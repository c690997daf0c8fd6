"""Statistics of a row in Triton, from the partial sums of its tiles."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.device import next_power_of_2
from rlsloth.kernels.linear_logprob.tiles import Tile

LOG2E = tl.constexpr(1.4426950408889634)


def join_tiles(partial_3RT: Tensor, odds_RV: Tensor, stats_4R: Tensor, tile: Tile) -> None:
    """Bring the tiles of each row to one scale, and write the row's statistics."""
    _, rows, tiles = partial_3RT.shape
    _rows_kernel[(rows,)](
        partial_3RT,
        partial_3RT.stride(0),
        tiles,
        odds_RV,
        odds_RV.stride(0),
        stats_4R,
        stats_4R.stride(0),
        odds_RV.shape[1],
        TILES=next_power_of_2(tiles),
        COLUMNS=tile.columns,
        num_warps=4,
    )


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
