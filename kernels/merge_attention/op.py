"""Attention over two sets of keys, merged from the attention over each.

By Milakov and Gimelshein 2018, arXiv:1805.02867.

With a and b the two outputs, and l and m the logarithms of their sums of exponentials:

    log-sum = log(exp(l) + exp(m))
    output = exp(l - log-sum) * a + exp(m - log-sum) * b

Completions of one prompt can so attend to its keys in one call, and to their own in another.
"""

from __future__ import annotations

import os

from torch import Tensor

from rlsloth.kernels.merge_attention.reference import merge_reference


def merge_attention(
    out_THD: Tensor, sums_HT: Tensor, other_THD: Tensor, other_sums_HT: Tensor, rows_N: Tensor
) -> None:
    """Merge a second attention into some rows of a first one, computed in float32, in place.

    Args:
        out_THD: [T, heads, D] outputs over the first keys; each row dense. Its rows ``rows_N``
            become those over both.
        sums_HT: [heads, T] float32 natural logarithms of the sums of exponentials of the scores;
            its last dimension dense. Its columns ``rows_N`` become those over both.
        other_THD: [T, heads, D] outputs over the second keys, with dense rows.
        other_sums_HT: like ``sums_HT``.
        rows_N: [N] int64, each row at most once.
    """
    if _in_triton(out_THD):
        from rlsloth.kernels.merge_attention import triton

        triton.merge(out_THD, sums_HT, other_THD, other_sums_HT, rows_N)
        return
    merged, sums = merge_reference(
        out_THD[rows_N], sums_HT[:, rows_N], other_THD[rows_N], other_sums_HT[:, rows_N]
    )
    out_THD[rows_N], sums_HT[:, rows_N] = merged, sums


def add_rows(target: Tensor, rows_N: Tensor, source: Tensor, from_N: Tensor | None = None) -> None:
    """Add rows of one tensor to rows of another, in place.

    Args:
        target: [T, ...] with dense rows.
        rows_N: [N] int64 rows of ``target``, each at most once.
        source: [S, ...] with dense rows.
        from_N: [N] int64 rows of ``source``; None: its rows in order, of which there are N.
    """
    if _in_triton(target):
        from rlsloth.kernels.merge_attention import triton

        triton.add_rows(target, rows_N, source, from_N)
        return
    target[rows_N] += source if from_N is None else source[from_N]


def _in_triton(x: Tensor) -> bool:
    # TRITON_INTERPRET is Triton's own switch: kernels then run on CPU tensors.
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
