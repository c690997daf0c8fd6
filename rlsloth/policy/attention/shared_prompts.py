"""Attention over prompts that completions share, with no key computed or stored twice.

Each segment attends to its own keys in one call; all completions of a prompt attend to its keys in
a second one, as a single sequence of queries. The two results are merged by their log-sums (the
cascade of Ye et al. 2024, https://flashinfer.ai/2024/02/02/cascade-inference.html). The backward of
either call needs only the merged output and log-sums (Dao 2023, arXiv:2307.08691, section 2.2), so
the gradients of the two add up to the exact ones.
"""

from __future__ import annotations

from torch import Tensor

from rlsloth.kernels.merge_attention.op import add_rows, merge_attention
from rlsloth.policy.attention.backend import Halves
from rlsloth.policy.attention.layout import PackedLayout


def forward(
    halves: Halves, q: Tensor, k: Tensor, v: Tensor, packed: PackedLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output [T, heads, D] and log-sums [heads, T] of q over k and v [T, kv_heads, D]."""
    out, sums = halves.forward(q, k, v, packed.own, scale)
    if (shared := packed.shared) is not None:
        first = shared.first
        keys, values = (x.index_select(0, shared.prompts) for x in (k, v))
        over_prompts = halves.forward(q[first:], keys, values, shared.sequences, scale)
        merge_attention(out[first:], sums[:, first:], *over_prompts, shared.rows)
    return out, sums


def backward(
    halves: Halves,
    packed: PackedLayout,
    scale: float,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given the output's and the results of ``forward``."""
    found = halves.backward(grad, q, k, v, out, sums, packed.own, scale)
    if (shared := packed.shared) is not None:
        first = shared.first
        keys, values = (x.index_select(0, shared.prompts) for x in (k, v))
        more = halves.backward(
            grad[first:],
            q[first:],
            keys,
            values,
            out[first:],
            sums[:, first:],
            shared.sequences,
            scale,
        )
        add_rows(found[0][first:], shared.rows, more[0], shared.rows)
        add_rows(found[1], shared.prompts, more[1])
        add_rows(found[2], shared.prompts, more[2])
    return found
