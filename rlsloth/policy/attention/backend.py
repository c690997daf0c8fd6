"""The interface of attention backends: implementations of attention over a packed stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsloth.policy.attention.layout import PackedLayout

Attend = Callable[[Tensor, Tensor, Tensor, PackedLayout, float], Tensor]
"""Function (q [heads, T, D], k and v [kv_heads, T, D], layout, scale) -> output [T, heads, D]."""


@dataclass(frozen=True, slots=True)
class Backend:
    """An attention implementation and the conditions under which it can be used."""

    name: str
    """Value of ``--model.attention`` that selects the backend."""
    attend: Attend
    """The implementation."""
    works: Callable[[], bool]
    """Tells whether the backend runs on this machine; on a GPU, with 16-bit inputs."""
    starts_quickly: bool = False
    """Whether "auto" prefers the backend for small models, which do not repay a slow start."""
    takes: Callable[[Any], bool] = lambda _: True
    """Tells whether the backend supports the heads of a model with this text configuration.

    Only "auto" checks this.
    """


def has_gpu(major: int) -> bool:
    """Tell whether there is a GPU with at least this major compute capability."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= major
