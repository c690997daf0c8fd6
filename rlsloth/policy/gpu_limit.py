"""A limit of the GPU memory that a run takes (``model.memory_gb``)."""

from __future__ import annotations

import torch

from rlsloth.errors import UserError

CONTEXT = int(0.8 * 2**30)
"""Allowance in bytes for the CUDA context, kernels, and cuBLAS's workspaces.

It grows as kernels are loaded. There is a workspace for each stream, 32 MiB on a Hopper GPU; torch
counts them as tensors. On an H200 the device counts 0.8 GiB more than torch (docs/PERFORMANCE.md).
"""


_limited: set[int] = set()
"""GPUs that an earlier run in this process has limited."""


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
        if index in _limited:
            torch.cuda.set_per_process_memory_fraction(1.0, index)
            _limited.discard(index)
        return
    room = gib * 2**30 - CONTEXT
    if room <= 0:
        raise UserError(
            f"--model.memory-gb {gib:g}: a CUDA context alone takes about "
            f"{CONTEXT / 2**30:.1f} GiB; pass more"
        )
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), index)
    _limited.add(index)
