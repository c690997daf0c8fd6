"""Memory that tensors on the GPU need, without what the allocator adds to it."""

from __future__ import annotations

from typing import Literal

import torch


def requested(when: Literal["current", "peak"] = "current") -> int:
    """Bytes that tensors requested.

    ``torch.cuda.memory_allocated`` counts blocks, whose ends may be unused (up to 1 MiB).
    """
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{when}"])
