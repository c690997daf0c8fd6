"""One way to compute attention over a packed stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsloth.policy.attention.layout import PackedLayout

Attend = Callable[[Tensor, Tensor, Tensor, PackedLayout, float], Tensor]
"""(q [heads, T, D], k and v [kv_heads, T, D], layout, scale) -> [T, heads, D]."""


@dataclass(frozen=True, slots=True)
class Backend:
    """An attention implementation, and when it can be used."""

    name: str
    """Value of ``--model.attention``."""
    attend: Attend
    works: Callable[[], bool]
    """Whether it runs on this machine, in 16 bits where that is a GPU."""
    starts_quickly: bool = False
    """Preferred for small models, whose layers are too short to repay a slow start."""
    takes: Callable[[Any], bool] = lambda config: True
    """Whether it takes the heads of a model with this text configuration as they are. Asked only
    where another backend can be chosen in its place."""


def has_gpu(major: int) -> bool:
    """Whether there is a GPU of at least this major compute capability."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= major
