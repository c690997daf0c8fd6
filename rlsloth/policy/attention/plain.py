"""Attention in plain torch operations, with soft caps, sinks and sliding windows.

It is also the fastest way to decode one token on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlsloth.policy.attention.layout import PackedLayout

BLOCK_ROWS = 512
"""Number of rows of a long sequence whose scores are in memory at the same time."""


def plain_packed(
    plain: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout
) -> Tensor:
    """Attend over a packed stream: small trees as squares, long sequences in blocks of rows.

    Blocks are recomputed in the backward pass, so that memory holds the scores of one at a time.

    Args:
        plain: ``plain_attention`` with its last four arguments bound.
        q: [heads, T, D].
        k: [kv_heads, T, D].
        v: [kv_heads, T, D].
        packed: the stream's layout.

    Returns:
        [T, heads, D].
    """
    pieces = []
    for bucket in packed.buckets:
        at = packed.positions[bucket.index][:, None]
        square = (x[:, bucket.index].transpose(0, 1) for x in (q, k, v))
        pieces.append(
            plain(*square, bucket.mask, at, at[..., None, :]).flatten(0, 1)[bucket.places]
        )
    for rows, keep in packed.long_sequences:
        keys, values, at = k[None, :, rows], v[None, :, rows], packed.positions[rows]
        for own in range(len(rows) - keep, len(rows), BLOCK_ROWS):
            block = slice(own, min(own + BLOCK_ROWS, len(rows)))
            mask = (at[block, None] >= at[None, :])[None, None]
            queries = q[None, :, rows[block]]
            out = checkpoint(plain, queries, keys, values, mask, at[block], at, use_reentrant=False)
            pieces.append(out[0])
    return torch.cat(pieces)[packed.back]


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    row_at: Tensor | None,
    column_at: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention by its definition, with scores in float32.

    Query heads that share a key head are folded into rows, so that each product reads the cache
    once; SDPA with a mask would first copy the cache for each query head. This makes decoding fast.

    Args:
        query: [B, heads, L, D].
        key: [B, kv_heads, L_k, D].
        value: [B, kv_heads, L_k, D].
        mask: [B, 1, L, L_k] bool, broadcastable: True where a row sees a column.
        row_at: [..., L] position of each row; needed with a window.
        column_at: [..., L_k] position of each column; needed with a window.
        scale: factor of the scores.
        window: number of positions that a row sees, including its own.
        softcap: cap of the scores: softcap * tanh(score / softcap).
        sinks: [heads] scores that take part in the softmax and add nothing to the output.

    Returns:
        [B, L, heads, D].
    """
    batch, heads, rows, width = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    if window is not None:
        assert row_at is not None
        assert column_at is not None
        mask = mask & (row_at[..., None] - column_at < window)
    folded = query.reshape(batch * kv_heads, heads // kv_heads * rows, width)
    across = key.flatten(0, 1).transpose(1, 2)
    if query.is_cuda and query.dtype != torch.float32 and not torch.is_grad_enabled():
        scores = torch.bmm(folded, across, out_dtype=torch.float32)
    else:
        scores = torch.bmm(folded.float(), across.float())
    scores = scores.view(batch, heads, rows, columns) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.float().view(1, heads, 1, 1).expand(batch, heads, rows, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    folded = weights.to(value.dtype).reshape(batch * kv_heads, -1, columns)
    out = torch.bmm(folded, value.flatten(0, 1))
    return out.view(batch, heads, rows, value.shape[-1]).transpose(1, 2)
