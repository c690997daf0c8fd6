"""NF4 weights whose scales and codes are chosen here, in the form that bitsandbytes stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Weights with one scale: neighbours in a row."""
OF_SCALES = 256
"""Scales that are stored in 8 bits with one scale of their own."""
FACTORS = 16
"""Number of scales that are tried for a block."""
NARROWEST, WIDEST = 0.65, 1.05
"""The smallest and the largest of them, relative to the block's largest absolute weight."""
CELLS, RANGE = 4096, 1.25
"""Cells in which the search looks up the nearest value, and the largest absolute weight in them."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of a weight's blocks, as they are read back from 8 bits."""

    values: Tensor
    """[O, I / BLOCK] float32."""
    stored: Tensor
    """[O * I / BLOCK] uint8 codes."""
    state: Any
    """bitsandbytes' QuantState of ``stored``."""
    offset: Tensor
    """Mean that was taken off before."""

    def of_columns(self, columns: Tensor) -> Tensor:
        """Return the scale of each row in some columns [C]: [O, C]."""
        return self.values[:, columns // BLOCK]


def code_values(device: torch.device) -> Tensor:
    """Return NF4's 16 values, ascending (Dettmers et al. 2023, arXiv:2305.14314)."""
    from bitsandbytes.functional import get_4bit_type

    values: Tensor = get_4bit_type("nf4", device=device)
    return values


def nearest_codes(weight: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """Return the code of the value that is nearest to each weight over its scale.

    Args:
        weight: [...] float32.
        scales: of the same shape; a weight with scale 0 gets the code of 0.
        values: NF4's values.
    """
    middles = (values[1:] + values[:-1]) / 2
    return torch.bucketize(weight / torch.where(scales == 0, 1.0, scales), middles)


def plain_scales(weight: Tensor) -> Scales:
    """Return bitsandbytes' own scales: the largest absolute weight of each block.

    Args:
        weight: [O, I] float32; I is a multiple of BLOCK.
    """
    return _stored(_blocks(weight).abs().amax(-1))


def searched_scales(weight: Tensor, importance: Tensor) -> Scales:
    """Return the scales with the smallest squared error of a layer's output, block by block.

    Args:
        weight: [O, I] float32; I is a multiple of BLOCK.
        importance: [I] mean squares of the layer's inputs; correlations between inputs are left to
            the choice of codes (feedback.py).
    """
    blocks, table = _blocks(weight), _cells(code_values(weight.device))
    largest, weights = blocks.abs().amax(-1), importance.view(1, -1, BLOCK)
    best = torch.full_like(largest, torch.inf)
    found = largest.clone()
    scaled = blocks / torch.where(largest == 0, 1.0, largest)[..., None]
    for factor in torch.linspace(NARROWEST, WIDEST, FACTORS).tolist():
        scales = largest * factor
        cells = ((scaled / factor + RANGE) * (CELLS / (2 * RANGE))).clamp(0, CELLS - 1).int()
        rounded = table.index_select(0, cells.flatten()).view_as(blocks)
        loss = ((rounded * factor - scaled).square() * weights).sum(-1) * largest.square()
        better = loss < best
        best, found = torch.where(better, loss, best), torch.where(better, scales, found)
    return _stored(found)


def _cells(values: Tensor) -> Tensor:
    """Return the nearest value at the middle of each of CELLS cells from -RANGE to RANGE.

    Looking it up is five times faster than a search, and wrong only beside a middle of two values,
    where both are as good.
    """
    width = 2 * RANGE / CELLS
    middles = torch.arange(CELLS, device=values.device) * width + width / 2 - RANGE
    return values[nearest_codes(middles, torch.ones_like(middles), values)]


def packed(codes: Tensor, scales: Scales, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a weight in a checkpoint, by the ends of their names.

    Args:
        codes: [O, I] numbers of NF4's values.
        scales: the weight's scales.
        dtype: type to which the weight is dequantised.
    """
    from bitsandbytes.functional import QuantState

    flat = codes.to(torch.uint8).flatten()
    state = QuantState(
        absmax=scales.stored,
        shape=codes.shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=code_values(codes.device),
        quant_type="nf4",
        offset=scales.offset,
        state2=scales.state,
    )
    pairs = (flat[::2] << 4) | flat[1::2]
    return {"": pairs[:, None]} | {f".{k}": v for k, v in state.as_dict(packed=True).items()}


def dequantised(codes: Tensor, scales: Scales) -> Tensor:
    """Return the weights [O, I] in float32."""
    each = scales.values.repeat_interleave(BLOCK, 1)
    return code_values(codes.device)[codes.long()] * each


def _blocks(weight: Tensor) -> Tensor:
    return weight.view(len(weight), -1, BLOCK)


def _stored(scales: Tensor) -> Scales:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    flat = scales.flatten()
    offset = flat.mean()
    stored, state = quantize_blockwise(flat - offset, blocksize=OF_SCALES)
    read = dequantize_blockwise(stored, state) + offset
    return Scales(read.view_as(scales), stored, state, offset)
