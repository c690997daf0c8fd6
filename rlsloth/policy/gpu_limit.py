"""Torch's memory on a GPU: a limit (``model.memory_gb``), and how it grows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlsloth.errors import UserError

CONTEXT = int(0.8 * 2**30)
"""Allowance in bytes for the CUDA context, kernels, and cuBLAS's workspaces.

It grows as kernels are loaded. There is a workspace for each stream, 32 MiB on a Hopper GPU; torch
counts them as tensors. On an H200 the device counts 0.8 GiB more than torch (docs/PERFORMANCE.md).
"""

_limits: dict[int, float] = {}
"""Index of a GPU -> bytes that torch may take there, if a run has limited them."""


def grow_segments(on: bool) -> None:
    """Let torch enlarge its segments of memory in place of adding more (expandable segments).

    Else the free parts of segments are lost to larger tensors: with a limit of 7.2 GiB, memory ran
    out while 1.6 GiB of it were free. A value in PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF is
    left alone. Memory that is already allocated stays as it is.

    Args:
        on: False for engines with memory pools of their own (vLLM), whose memory must not move.
    """
    if not any(os.environ.get(f"PYTORCH_{name}ALLOC_CONF") for name in ("", "CUDA_")):
        _set_allocator(f"expandable_segments:{on}")


@contextmanager
def fixed_segments(device: torch.device) -> Iterator[None]:
    """Add segments of memory within the block, and enlarge them again afterwards."""
    if device.type == "cuda":
        grow_segments(False)
    try:
        yield
    finally:
        if device.type == "cuda":
            grow_segments(True)


def _set_allocator(settings: str) -> None:
    # torch 2.13 warns of the older name.
    now: Any = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (now or torch.cuda.memory._set_allocator_settings)(settings)


def limit_memory(gib: float | None, device: torch.device) -> None:
    """Keep torch from taking more than so many GiB of a GPU, less what the CUDA context takes.

    Args:
        gib: ``model.memory_gb``; None: an earlier run's limit is lifted.
        device: the GPU, with its index.

    Raises:
        UserError: the context alone takes as much.
    """
    index = device.index or 0
    if gib is None:
        if _limits.pop(index, None) is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, index)
        return
    _set(index, torch_room(gib))


def torch_room(gib: float) -> float:
    """Return the bytes that torch may take of ``model.memory_gb``.

    Raises:
        UserError: the context alone takes as much.
    """
    room = gib * 2**30 - CONTEXT
    if room <= 0:
        raise UserError(
            f"--model.memory-gb {gib:g}: a CUDA context alone takes about "
            f"{CONTEXT / 2**30:.1f} GiB; pass more"
        )
    return room


def raise_limit(size: int, device: torch.device) -> None:
    """Let torch count ``size`` bytes more, or fewer if it is negative, where a limit is set.

    For memory that vLLM has given back, or taken again, without torch's knowledge: torch goes on
    counting it while vLLM sleeps.
    """
    index = device.index or 0
    if index in _limits:
        _set(index, _limits[index] + size)


def _set(index: int, room: float) -> None:
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), index)
    _limits[index] = room
