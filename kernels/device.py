"""Launches of Triton kernels: their device and their numbers of programs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

_NOTHING = nullcontext()


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Make a tensor's GPU the current one, on which Triton launches.

    It mostly is: then this takes a tenth of the time of ``torch.cuda.device_of``.
    """
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NOTHING
    other: AbstractContextManager[None] = torch.cuda.device(x.device)
    return other


def multiplies_in_triton(x: Tensor) -> bool:
    """Tell whether kernels that multiply matrices are fast on a tensor's device.

    Before compute capability 8.0, Triton's compiler uses no tensor cores: cuBLAS is faster.
    """
    return not x.is_cuda or _capability(x.device.index) >= 8


@cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def cdiv(a: int, b: int) -> int:
    """Return ``a / b`` rounded up; ``triton.cdiv`` takes 5 microseconds outside a kernel."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least ``n``, for ``n`` of at least 1."""
    return 1 << (n - 1).bit_length()
