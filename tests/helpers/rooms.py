"""The order of rooms, and imports against it."""

from __future__ import annotations

from collections.abc import Iterator

from helpers.source import Module, imported_modules

ORDER = (
    ("errors", "records", "seeding", "exchange", "kernels"),
    ("config",),
    ("files", "plugins"),
    ("losses",),
    ("data", "policy", "scoring", "run"),
    ("rewards",),
    ("environments", "memory"),
    ("envs",),
    ("rollout",),
    ("evaluation",),
    ("training",),
    ("exports", "distillation"),
    ("cluster",),
    ("api",),
    ("cli",),
    ("__main__",),
)
"""Rooms from the lowest: each imports only rooms of earlier lines, and never its siblings."""

LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
"""Room -> its line in ORDER."""


def rises(module: Module) -> Iterator[tuple[str, int]]:
    """(module, line) of each import from a room of the same or a later line of ORDER."""
    for other, found in imported_modules(module):
        room = other.split(".")[1] if "." in other else module.room
        if room != module.room and LEVEL[room] >= LEVEL[module.room]:
            yield other, found.line
