"""Tile sizes of the fused product, by device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

HIDDEN_BLOCK = 1024
"""Columns of hidden states that a program holds at a time, outside the fused product."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of the product (rows x columns x depth) and its launch settings."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    row_group: int = 8
    """Most row tiles that visit all columns before the next group begins. Their hidden states stay
    in L2: 8 MiB for 1024 rows of 4096, while a trained head's 8192 rows would exceed it."""


PLAIN_TILE = Tile(128, 128, 64, warps=8, stages=2)
TILES = {9: Tile(128, 256, 64, warps=8, stages=3)}
"""Tiles by major compute capability: the fastest of those tried on such a card (docs/LOG.md)."""


@cache
def tile_of(device: torch.device) -> Tile:
    """Return the tile for a device."""
    if device.type == "cpu":  # interpreted
        return PLAIN_TILE
    return TILES.get(torch.cuda.get_device_capability(device)[0], PLAIN_TILE)


@cache
def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a device."""
    if device.type == "cpu":  # interpreted
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
