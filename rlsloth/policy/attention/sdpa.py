"""Attention backend ``sdpa``: torch's scaled_dot_product_attention, which works on every device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlsloth.policy.attention.backend import Backend
from rlsloth.policy.attention.layout import PackedLayout


def _attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    """Attend over small trees as masked squares, and over longer ones sequence by sequence."""
    pieces = []
    for bucket in packed.buckets:
        square = scaled_dot_product_attention(
            q[:, bucket.index].transpose(0, 1),
            k[:, bucket.index].transpose(0, 1),
            v[:, bucket.index].transpose(0, 1),
            attn_mask=bucket.mask,
            scale=scale,
            enable_gqa=True,
        )
        pieces.append(square.transpose(1, 2).flatten(0, 1)[bucket.places])
    for rows, keep in packed.long_sequences:
        square = scaled_dot_product_attention(
            q[None, :, rows],
            k[None, :, rows],
            v[None, :, rows],
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        pieces.append(square[0, :, -keep:].transpose(0, 1))
    return torch.cat(pieces)[packed.back]


SDPA = Backend("sdpa", _attend, works=lambda: True)
