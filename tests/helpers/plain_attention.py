"""Attention in two halves by its definition, with NaN in every row that no sequence contains."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from rlsloth.policy.attention.layout import Sequences


def pairs(sequences: Sequences) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of queries and of keys of each sequence."""
    q, k = sequences.cu_q.tolist(), sequences.cu_k.tolist()
    used = [b - a for a, b in pairwise(q)]
    if sequences.used_q is not None:
        used = sequences.used_q.tolist()
    for i, count in enumerate(used):
        assert q[i] + count <= q[i + 1]
        assert count <= sequences.max_q
        assert k[i + 1] - k[i] <= sequences.max_k
        yield slice(q[i], q[i] + count), slice(k[i], k[i + 1])


def scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Return the masked scores [heads, rows, columns] of one sequence."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = torch.einsum("qhd,khd->hqk", q, k) * scale
    if not causal:
        return found
    rows = torch.arange(q.shape[0], device=q.device) + k.shape[0] - q.shape[0]
    columns = torch.arange(k.shape[0], device=q.device)
    return found.masked_fill(rows[:, None] < columns, -torch.inf)


def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output and log-sums."""
    out = torch.full_like(q, torch.nan)
    sums = q.new_full((q.shape[1], q.shape[0]), torch.nan)
    group = q.shape[1] // v.shape[1]
    for a, b in pairs(sequences):
        found = scores(q[a], k[b], scale, sequences.causal)
        sums[:, a] = found.logsumexp(-1)
        out[a] = torch.einsum("hqk,khd->qhd", found.softmax(-1), v[b].repeat_interleave(group, 1))
    return out, sums


def plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    sequences: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations of FlashAttention-2 (Dao 2023), section 2.2, from the forward's log-sums."""
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    group = q.shape[1] // v.shape[1]

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    for a, b in pairs(sequences):
        p = (scores(q[a], k[b], scale, sequences.causal) - sums[:, a, None]).exp()
        values, keys = (x[b].repeat_interleave(group, 1) for x in (v, k))
        dv[b] = per_key_head(torch.einsum("hqk,qhd->khd", p, grad[a]))
        dp = torch.einsum("qhd,khd->hqk", grad[a], values)
        ds = p * (dp - (grad[a] * out[a]).sum(-1).t()[..., None]) * scale
        dq[a] = torch.einsum("hqk,khd->qhd", ds, keys)
        dk[b] = per_key_head(torch.einsum("hqk,qhd->khd", ds, q[a]))
    return dq, dk, dv
