"""Time page-locking of host memory: rlsloth's blocks, and others' ways to make the pages.

Usage: python examples/benchmarks/page_lock.py [--gib 2]

Prints for each way the seconds a GiB until the memory exists and is locked, and the speed of copies
to the GPU.
"""

from __future__ import annotations

import argparse
import mmap
import time
from collections.abc import Callable

import torch
from torch import Tensor

from rlsloth.policy.activations.arena import BLOCK
from rlsloth.policy.page_lock import host_block, lock, unlock

GIB = 1 << 30


def shared(size: int) -> Tensor:
    """Allocate a shared mapping, whose pages CUDA makes when it locks them."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def private(size: int) -> Tensor:
    """Allocate a private mapping with ordinary pages, made by torch's threads."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2, help="memory to lock in each way")
    count = max(1, int(parser.parse_args().gib * GIB / BLOCK))
    torch.zeros(1, device="cuda")
    ways: dict[str, Callable[[int], Tensor]] = {
        "host_block": host_block, "private pages": private, "shared, made by CUDA": shared,
    }  # fmt: skip
    for name, make in ways.items():
        start = time.perf_counter()
        blocks = [make(BLOCK) for _ in range(count)]
        made = time.perf_counter()
        locked = [block for block in blocks if lock(block)]
        done = time.perf_counter()
        each = count * BLOCK / GIB
        seconds = f"made {(made - start) / each:.3f} s/GiB, locked {(done - made) / each:.3f} s/GiB"
        speed = f"copied at {_copied(blocks):.1f} GiB/s"
        print(f"{name}: {seconds} ({len(locked)} of {count}), {speed}")
        unlock(locked)
    start = time.perf_counter()
    torch.empty(count * BLOCK, dtype=torch.uint8, pin_memory=True)
    print(f"torch's pin_memory: {(time.perf_counter() - start) / each:.3f} s/GiB")


def _copied(blocks: list[Tensor]) -> float:
    """Return the GiB a second of copies to the GPU."""
    target = torch.empty(BLOCK, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for block in blocks:
        target.copy_(block, non_blocking=True)
    torch.cuda.synchronize()
    return len(blocks) * BLOCK / GIB / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
