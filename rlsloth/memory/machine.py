"""The memory of this machine that a run may take."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from rlsloth.config import ModelConfig
from rlsloth.memory.cards import UNKNOWN, Card, card_of_device
from rlsloth.memory.terms import GIB
from rlsloth.policy.device import has_bf16
from rlsloth.policy.gpu_limit import CONTEXT

HOST_SHARE = 0.8
"""Share of the free host memory that may be taken."""
_CGROUP = Path("/sys/fs/cgroup")
CGROUPS = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)
"""Files of a container's limit and use of memory, in the two versions of Linux control groups."""
OTHERS = 0.02
"""Share of a GPU below which memory in use is not counted as other programs'."""


def gpu_bytes(model: ModelConfig) -> int | None:
    """Return the bytes of the GPU that the run may take, or None if it runs on a CPU.

    These are ``model.memory_gb``, or all that other programs do not use now.
    """
    if model.device == "cpu" or not torch.cuda.is_available():
        return None
    index = torch.device("cuda" if model.device == "auto" else model.device).index or 0
    free, total = torch.cuda.mem_get_info(index)
    others = total - free - torch.cuda.memory_reserved(index) - CONTEXT
    room = total - others if others > OTHERS * total else total
    return room if model.memory_gb is None else min(room, int(model.memory_gb * GIB))


def card_of(model: ModelConfig) -> Card:
    """Return the card whose speeds the run's GPU has; UNKNOWN on a CPU."""
    if model.device == "cpu" or not torch.cuda.is_available():
        return UNKNOWN
    device = torch.device("cuda" if model.device == "auto" else model.device)
    card = card_of_device(torch.cuda.get_device_name(device))
    return replace(card, bf16=has_bf16(device))  # also if the name is not in the table


def host_bytes() -> int:
    """Return the bytes of this machine's memory that a run may take, also inside a container."""
    available = int(psutil.virtual_memory().available)
    for limit, used in CGROUPS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            room = int(limit.read_text()) - int(used.read_text()) + _reclaimable(used.parent)
            available = min(available, room)
    return int(HOST_SHARE * max(0, available))


def _reclaimable(group: Path) -> int:
    """Return the bytes of a control group's page cache that the kernel gives up when asked.

    ``memory.current`` counts it: after a checkpoint was read, it is as large as the checkpoint.
    """
    with suppress(OSError, ValueError):
        rows = [row.split() for row in (group / "memory.stat").read_text().splitlines()]
        found = {row[0]: int(row[1]) for row in rows if len(row) == 2}
        return found.get("total_inactive_file", found.get("inactive_file", 0))
    return 0
