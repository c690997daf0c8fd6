"""Page-locked host memory: a GPU copies it at full speed beside its work, and can address it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lock(block: Tensor) -> bool:
    """Page-lock a CPU tensor's memory; return whether the system allowed it."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return int(runtime.cudaHostRegister(block.data_ptr(), block.numel() * block.itemsize, 0)) == 0


def unlock(blocks: list[Tensor]) -> None:
    """Unlock and forget blocks, once no copy uses them any more.

    Memory that is still locked when it is freed would break later copies.
    """
    if blocks:
        torch.cuda.synchronize()
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for block in blocks:
            runtime.cudaHostUnregister(block.data_ptr())
        blocks.clear()
