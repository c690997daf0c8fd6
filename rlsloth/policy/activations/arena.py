"""Host memory for tensors that leave the GPU: page-locked blocks, cut into slabs of one size."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor

from rlsloth.errors import UserError
from rlsloth.policy.page_lock import host_block, lock, unlock

SLAB = 32 * 2**20
"""Bytes of a slab. Copying one takes 0.6 ms at 50 GB/s, far more than starting the copy."""
BLOCK = 16 * SLAB
"""Bytes that are page-locked at once: large pages, and a fixed cost a call."""


class HostFullError(UserError):
    """The host has no memory left for activations."""


def arena_bytes(tensors: Iterable[tuple[int, int]]) -> int:
    """Return the bytes of an arena that holds tensors at once, given as bytes and their number."""
    slabs = sum(number * -(-size // SLAB) for size, number in tensors)
    return -(-slabs * SLAB // BLOCK) * BLOCK


class HostArena:
    """Slabs of host memory, which are allocated when they are first needed and kept for reuse.

    torch's own page-locked allocator rounds sizes up to powers of two, which would waste up to half
    of the host's memory on long sequences.
    """

    def __init__(self, *, pinned: bool, say: Callable[[str], None] = print) -> None:
        """Make an empty arena.

        Args:
            pinned: page-lock the memory, so that a GPU copies at full speed beside its work.
            say: prints a line, if the system refuses to page-lock memory.
        """
        self._pinned, self._say = pinned, say
        self._free: list[Tensor] = []
        self._blocks: list[Tensor] = []
        self._locked: list[Tensor] = []
        self._unlock = weakref.finalize(self, unlock, self._locked)

    def take(self, size: int) -> list[Tensor]:
        """Return uint8 slabs that together hold at least ``size`` bytes.

        Raises:
            HostFullError: the host has no memory left.
        """
        count = -(-size // SLAB)
        while len(self._free) < count:
            self._grow()
        return [self._free.pop() for _ in range(count)]

    def give(self, slabs: list[Tensor]) -> None:
        """Take slabs back; no copy may be using them any more, or only earlier on its stream."""
        self._free += slabs

    @property
    def size(self) -> int:
        """Bytes of host memory that the arena holds."""
        return sum(block.numel() for block in self._blocks)

    def close(self) -> None:
        """Unlock and free all memory; no slab may be in use."""
        self._unlock()
        self._free, self._blocks = [], []

    def _grow(self) -> None:
        try:
            block = host_block(BLOCK)
        except OSError as error:
            raise HostFullError(
                f"the host has no {BLOCK >> 20} MiB of memory left for activations "
                f"({self.size >> 20} MiB are in use; {error}); lower --tokens-per-microbatch, or "
                "pass --model.gradient-checkpointing true"
            ) from error
        if self._pinned and lock(block):
            self._locked.append(block)
        elif self._pinned:
            self._pinned = False
            self._say(
                "the system refuses page-locked memory (limit: ulimit -l): activations are copied "
                "to ordinary host memory, which is slower"
            )
        self._blocks.append(block)
        self._free += block.split(SLAB)  # type: ignore[no-untyped-call]
