"""Page-locked host memory: a GPU copies it at full speed beside its work, and can address it."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


def host_block(size: int) -> Tensor:
    """Allocate uint8 host memory of its own pages, which go back to the system when it is freed.

    Its pages exist when it is returned: torch's threads write zeros to all of them, in pages of
    2 MiB where the system has them. CUDA alone makes them one by one while it locks them, which
    takes up to ten times as long (docs/PERFORMANCE.md).

    Raises:
        OSError: the host has no memory left.
    """
    if sys.platform == "linux":
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel that has no large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        # After a fork, a write would give this process a new page and leave the locked one to the
        # other, where the GPU would still copy to.
        with suppress(OSError):
            memory.madvise(mmap.MADV_DONTFORK)
    else:
        memory = mmap.mmap(-1, size)
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()


def lock(block: Tensor) -> bool:
    """Page-lock a CPU tensor's memory; return whether the system allowed it."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)) == 0:
        return True
    # The refusal stays CUDA's last error: the next kernel would fail with it.
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False


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
