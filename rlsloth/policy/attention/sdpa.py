"""torch's scaled_dot_product_attention with masks: works everywhere, on a CPU and in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlsloth.policy.attention.backend import Backend
from rlsloth.policy.attention.layout import PackedLayout


def _attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float) -> Tensor:
    """A masked square for each small tree, one call a sequence for the rest."""
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
