"""How the fused product is cut, by device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """How the product is cut: rows x columns x depth, and what runs it."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    row_group: int = 8
    """Most row tiles that meet all columns before the next ones begin. Their hidden states stay in
    L2: 8 MiB at 1024 rows of 4096, where those of a trained head's 8192 rows exceed it."""


PLAIN_TILE = Tile(128, 128, 64, warps=8, stages=2)
TILES = {9: Tile(128, 256, 64, warps=8, stages=3)}
"""By major compute capability; the fastest of those tried on such a card (docs/LOG.md)."""


@cache
def tile_of(device: torch.device) -> Tile:
    """The tile for a device."""
    if device.type == "cpu":  # interpreted
        return PLAIN_TILE
    return TILES.get(torch.cuda.get_device_capability(device)[0], PLAIN_TILE)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type == "cpu":  # interpreted
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
