"""A lock file: one process at a time writes to a run folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from rlsloth.errors import naming_writes


class LockedError(Exception):
    """Another living process holds the lock; ``owner`` is its process id, or ``unknown``."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"locked by process {owner}")
        self.owner = owner


def lock(path: Path) -> IO[str]:
    """Take a lock file for this process and write the process id into it.

    Closing the returned file releases the lock; the kernel does so when the process ends, however
    it ends.

    Raises:
        LockedError: another process holds it.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as the lock is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise LockedError(owner) from None
    with naming_writes(path, lambda: len(f"{os.getpid()}\n")):
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file
