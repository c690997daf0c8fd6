"""The plan of an NF4 product: how it is cut into programs, and how deep their pipelines are."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from rlsloth.kernels.nf4.ptx import TABLE_BYTES

# Rows of the weight per program: 128 keep the repeated reads of x, M * I for each program, below
# the traffic of the weight itself.
BLOCK_O = 128
MIN_STEPS = 4  # blocks of 64 columns per split: fewer would not fill the pipeline
MAX_STEPS = 256  # with more, a row of a split could need three absmax2
# Triton raises a program's shared memory limit, to the device's minus the table, only if the
# program needs more than this in addition to the table.
UNRAISED = 48 * 1024


class Gpu(NamedTuple):
    """The properties of a device that a plan depends on."""

    multiprocessors: int
    shared: int
    """Bytes of shared memory that a program can use."""
    wgmma: bool
    """Whether dots are Hopper's, which still read x while a later x is fetched."""


class Plan(NamedTuple):
    """Launch settings, a function of shape and device only, so that sums keep their order."""

    block_m: int
    steps: int
    """Blocks of 64 columns per split."""
    splits: int
    unroll: int
    """Blocks per turn of the loop."""
    stages: int
    """Turns in flight."""


@cache
def plan(rows: int, out: int, blocks: int, gpu: Gpu) -> Plan:
    """Plan a program for every multiprocessor: columns are split if there are too few rows."""
    block_m = min(128, max(16, 1 << (rows - 1).bit_length()))
    tiles = -(-rows // block_m) * -(-out // BLOCK_O)
    splits = max(1, gpu.multiprocessors // tiles)
    unroll, stages = _pipeline(block_m, gpu)
    steps = max(MIN_STEPS, -(-blocks // splits))
    steps = min(MAX_STEPS, -(-steps // unroll) * unroll)
    return Plan(block_m, steps, -(-blocks // steps), unroll, stages)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """Properties of a device; a CPU, which interprets, counts as an H100 with one processor."""
    if device.type != "cuda":
        return Gpu(1, 227 * 1024, wgmma=True)
    properties = torch.cuda.get_device_properties(device)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(properties.multi_processor_count, shared, properties.major == 9)


def _pipeline(block_m: int, gpu: Gpu) -> tuple[int, int]:
    """Return unroll and stages: they use more shared memory than UNRAISED, up to all of it."""
    for unroll, least in ((2, 4), (2, 3), (1, 4)):
        weight, x = BLOCK_O * (32 + 4) * unroll, block_m * 128 * unroll
        stages = least
        while (used := (stages - 1) * (weight + x) + gpu.wgmma * x) <= UNRAISED:
            stages += 1
        if used + TABLE_BYTES <= gpu.shared:
            break
    return unroll, stages
