"""NF4 (Dettmers et al. 2023, arXiv:2305.14314) in plain torch: the reference for tests."""

from __future__ import annotations

import torch
from torch import Tensor

# The format's 16 float32 values, as defined by bitsandbytes: quantiles of a normal distribution,
# scaled to [-1, 1], one of them 0.
CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def dequantize_reference(
    packed: Tensor, absmax: Tensor, shape: tuple[int, int], blocksize: int, dtype: torch.dtype
) -> Tensor:
    """Return ``code * absmax`` [O, I]: two codes per byte, the first in the high nibble.

    Blocks are cut from the flattened matrix.
    """
    packed = packed.reshape(-1).long()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: shape[0] * shape[1]]
    values = torch.tensor(CODES, dtype=absmax.dtype, device=packed.device)[codes]
    scales = absmax.repeat_interleave(blocksize)[: values.numel()]
    return (values * scales).to(dtype).view(shape)


def absmax_reference(codes: Tensor, table: Tensor, absmax2: Tensor, offset: Tensor) -> Tensor:
    """Return a nested absmax: ``table[code] * absmax2 + offset``, 256 codes per absmax2."""
    scales = absmax2.repeat_interleave(256)[: codes.numel()]
    return table[codes.long()] * scales + offset
