"""Host memory that is to be page-locked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rlsloth.policy.page_lock import host_block

SIZE = 64 << 20


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_exist_at_once_and_go_back() -> None:
    """CUDA would make them one by one while it locks them."""
    before = resident()
    block = host_block(SIZE)
    assert resident() - before > 0.9 * SIZE
    assert not block.any()
    del block
    assert resident() - before < 0.1 * SIZE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_block_stays_usable_beside_a_forked_process() -> None:
    block = host_block(1 << 20).fill_(3)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert int(block.fill_(4).sum()) == 4 << 20
