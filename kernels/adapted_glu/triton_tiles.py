"""Tiles of matrices in Triton: loading, storing and multiplying them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def dot(
    left: tl.tensor, right: tl.tensor, total: tl.tensor, INTERPRETED: tl.constexpr
) -> tl.tensor:
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as integers
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total)


@triton.jit  # type: ignore[untyped-decorator]
def load(
    pointer: tl.tensor,
    stride: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    first_column: tl.tensor,
    columns: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Load a tile of a matrix, with zeros past its end.

    Offsets within a tile are the same for every tile: only its corner takes 64 bits.
    """
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows - first) & (column < columns - first_column)
    pointer += tl.cast(first, tl.int64) * stride + first_column
    return tl.load(pointer + (row * stride + column), mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def store(
    pointer: tl.tensor,
    stride: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    first_column: tl.tensor,
    columns: tl.tensor,
    tile: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Store a tile at the address that ``load`` reads."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows - first) & (column < columns - first_column)
    pointer += tl.cast(first, tl.int64) * stride + first_column
    tl.store(pointer + (row * stride + column), tile, mask=inside)
