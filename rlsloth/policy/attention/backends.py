"""The table of attention backends, and the choice of one for a run."""

from __future__ import annotations

from typing import Any

import torch

from rlsloth.errors import UserError
from rlsloth.policy.attention.cudnn import CUDNN
from rlsloth.policy.attention.fa4 import FA4
from rlsloth.policy.attention.flex import FLEX
from rlsloth.policy.attention.sdpa import SDPA
from rlsloth.policy.attention.varlen import VARLEN

BACKENDS = {backend.name: backend for backend in (FA4, CUDNN, VARLEN, FLEX, SDPA)}
"""Name -> backend, fastest first."""
SMALL = 10**9
"""Number of parameters below which a model is too small to repay a slow start.

flash-attention 4 takes 3 s to import and 10 s to compile; cuDNN needs a call for each sequence.
"""


def available_backends() -> list[str]:
    """List the names of the backends that work on this machine, fastest first."""
    return [name for name, backend in BACKENDS.items() if backend.works()]


def choose_backend(
    wanted: str, device: torch.device, dtype: torch.dtype, config: Any, parameters: int
) -> str:
    """Choose a run's attention backend and return its name.

    Args:
        wanted: value of ``model.attention``: a backend's name, or "auto".
        device: the model's device.
        dtype: the model's compute type.
        config: the model's text configuration.
        parameters: the model's number of parameters.

    Raises:
        UserError: the named backend does not work on this device in this type.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    usable = available_backends() if device.type == "cuda" and half else ["sdpa"]
    if wanted == "auto":
        quick = [n for n in usable if BACKENDS[n].starts_quickly and BACKENDS[n].takes(config)]
        return quick[0] if quick and parameters < SMALL else usable[0]
    if wanted not in usable:
        raise UserError(
            f"--model.attention {wanted} does not work on {device} in {str(dtype)[6:]}; pass auto, "
            f"{', '.join(usable)}"
        )
    return wanted
