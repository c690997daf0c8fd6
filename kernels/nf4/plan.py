"""How the product is cut into programs, and how deep their pipelines are."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from rlsloth.kernels.nf4.ptx import TABLE_BYTES

# Rows of the weight a program multiplies: 128 keep the re-reading of x, M * I for each program,
# below the traffic of the weight itself.
BLOCK_O = 128
MIN_STEPS = 4  # blocks of 64 columns in a split: fewer would not fill the pipeline
MAX_STEPS = 256  # with more, a row of a split could meet three absmax2
# Triton raises a program's limit of shared memory, to what the table leaves of the device's, only
# if it needs more than this beside the table.
UNRAISED = 48 * 1024


class Gpu(NamedTuple):
    """What a plan depends on besides the shape."""

    multiprocessors: int
    shared: int
    """Bytes of shared memory that a program can have."""
    wgmma: bool
    """Whether a dot is Hopper's, which still reads x while a later x is fetched."""


class Plan(NamedTuple):
    """A function of shape and device only, so that sums keep their order."""

    block_m: int
    steps: int
    """Blocks of 64 columns in a split."""
    splits: int
    unroll: int
    """Blocks in a turn of the loop."""
    stages: int
    """Turns in flight."""


@cache
def plan(rows: int, out: int, blocks: int, gpu: Gpu) -> Plan:
    """A program for every multiprocessor: columns are cut where there are too few rows."""
    block_m = min(128, max(16, 1 << (rows - 1).bit_length()))
    tiles = -(-rows // block_m) * -(-out // BLOCK_O)
    splits = max(1, gpu.multiprocessors // tiles)
    unroll, stages = _pipeline(block_m, gpu)
    steps = max(MIN_STEPS, -(-blocks // splits))
    steps = min(MAX_STEPS, -(-steps // unroll) * unroll)
    return Plan(block_m, steps, -(-blocks // steps), unroll, stages)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """Of a CPU, where Triton's interpreter runs, an H100 with one multiprocessor."""
    if device.type != "cuda":
        return Gpu(1, 227 * 1024, wgmma=True)
    properties = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(properties.multi_processor_count, shared, properties.major == 9)


def _pipeline(block_m: int, gpu: Gpu) -> tuple[int, int]:
    """Unroll and stages: more shared memory than UNRAISED, and with the table what there is."""
    for unroll, least in ((2, 4), (2, 3), (1, 4)):
        weight, x = BLOCK_O * (32 + 4) * unroll, block_m * 128 * unroll
        stages = least
        while (used := (stages - 1) * (weight + x) + gpu.wgmma * x) <= UNRAISED:
            stages += 1
        if used + TABLE_BYTES <= gpu.shared:
            break
    return unroll, stages
