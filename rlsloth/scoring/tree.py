"""Ending all processes that a worker started, those in sessions of their own included.

The supervisor of a worker adopts orphans (Linux), so every process below it can be found by its
parents. A process that escapes even that is known by a variable of its environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

MARK = "RLSLOTH_WORKER"
"""Environment variable with a worker's own value, which all of its processes inherit."""
_ROUNDS = 50
_ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1, 0, 0, 0)


def end_tree(root: int, mark: str) -> None:
    """Kill all processes below ``root`` and all with that mark, but neither ``root`` nor this one.

    Does nothing on systems without /proc.
    """
    for _ in range(_ROUNDS):  # a killed process may just have started another one
        found = _below(root) | _marked(mark)
        found -= {root, os.getpid()}
        if not found:
            return
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _below(root: int) -> set[int]:
    """Living processes whose line of parents leads to ``root``."""
    parents = dict(_parents())
    found = set()
    for pid in parents:
        at, seen = pid, {pid}
        while (at := parents.get(at, 0)) and at not in seen:
            seen.add(at)
            if at == root:
                found.add(pid)
                break
    return found


def _parents() -> list[tuple[int, int]]:
    """(process, its parent) of every living process."""
    found = []
    for entry in _processes():
        with contextlib.suppress(OSError, IndexError):
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found.append((int(entry.name), int(fields[1])))
    return found


def _marked(mark: str) -> set[int]:
    """Processes that were started with that mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = set()
    for entry in _processes():
        with contextlib.suppress(OSError):  # ended, or another user's
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
    return found


def _processes() -> list[Path]:
    with contextlib.suppress(OSError):
        return [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return []
