"""Rotary position embedding in plain torch, in any dtype: the reference for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_reference(
    q_BSHD: Tensor, k_BSKD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor
) -> tuple[Tensor, Tensor]:
    """``x * cos + rotate_half(x) * sin`` on the first R of D dimensions, as in transformers."""
    cos_BS1R, sin_BS1R = cos_BSR.unsqueeze(2), sin_BSR.unsqueeze(2)

    def rotate(x: Tensor) -> Tensor:
        turned, rest = x[..., : cos_BSR.shape[-1]], x[..., cos_BSR.shape[-1] :]
        first, second = turned.chunk(2, -1)
        half_turn = torch.cat((-second, first), -1)
        return torch.cat((turned * cos_BS1R + half_turn * sin_BS1R, rest), -1)

    return rotate(q_BSHD), rotate(k_BSKD)
