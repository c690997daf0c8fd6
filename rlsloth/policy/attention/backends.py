"""The table of packed attention backends, and the choice of one for a run."""

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
"""All backends by name, fastest first."""
SMALL = 10**9
"""Parameters below which a model's layers are too short to repay a slow start: flash-attention 4
takes 3 s to import and 10 s to compile, cuDNN a call for each sequence."""


def available_backends() -> list[str]:
    """Names of the packed attention backends that work on this machine, fastest first."""
    return [name for name, backend in BACKENDS.items() if backend.works()]


def choose_backend(
    wanted: str, device: torch.device, dtype: torch.dtype, config: Any, parameters: int
) -> str:
    """The name of a run's attention backend.

    Args:
        wanted: a name, or "auto".
        config: the model's text configuration.
        parameters: the model's size.

    Raises:
        UserError: the backend named does not work here.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    usable = available_backends() if device.type == "cuda" and half else ["sdpa"]
    if wanted == "auto":
        quick = [n for n in usable if BACKENDS[n].starts_quickly and BACKENDS[n].takes(config)]
        return quick[0] if quick and parameters < SMALL else usable[0]
    if wanted not in usable:
        raise UserError(
            f"--model.attention {wanted} does not work on {device} in {str(dtype)[6:]}; "
            f"here: {', '.join(usable)}"
        )
    return wanted
