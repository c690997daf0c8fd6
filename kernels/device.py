"""The device on which Triton launches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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
