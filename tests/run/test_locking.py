"""The lock of a run folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlsloth.run.locking import LockedError, lock


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = lock(path)
    with pytest.raises(LockedError) as found:
        lock(path)
    assert found.value.owner == str(os.getpid())
    held.close()
    lock(path).close()
