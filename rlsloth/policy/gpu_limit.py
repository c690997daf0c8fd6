"""A limit of the GPU memory that a run takes (``model.memory_gb``)."""

from __future__ import annotations

import torch

from rlsloth.errors import UserError

CONTEXT = int(0.8 * 2**30)
"""Allowance in bytes for the CUDA context, kernels, and cuBLAS's workspaces.

It grows as kernels are loaded. There is a workspace for each stream, 32 MiB on a Hopper GPU; torch
counts them as tensors. On an H200 the device counts 0.8 GiB more than torch (docs/PERFORMANCE.md).
"""


def limit_memory(gib: float | None, device: torch.device) -> None:
    """Keep torch from taking more than so many GiB of a GPU, less what the CUDA context takes.

    Args:
        gib: ``model.memory_gb``; None: no limit is set.
        device: the GPU.

    Raises:
        UserError: the context and other programs take as much already.
    """
    if gib is None:
        return
    free, total = torch.cuda.mem_get_info(device)
    context = max(CONTEXT, total - free - torch.cuda.memory_reserved(device))
    share = (gib * 2**30 - context) / total
    if share <= 0:
        raise UserError(
            f"--model.memory-gb {gib:g}: the CUDA context and other programs take "
            f"{context / 2**30:.1f} GiB of this GPU already; pass more"
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
