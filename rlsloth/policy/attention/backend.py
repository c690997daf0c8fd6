"""The interface of attention backends: implementations of attention over a packed stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsloth.policy.attention.layout import PackedLayout, Sequences

Attend = Callable[[Tensor, Tensor, Tensor, PackedLayout, float], Tensor]
"""Function (q [heads, T, D], k and v [kv_heads, T, D], layout, scale) -> output [T, heads, D]."""


@dataclass(frozen=True, slots=True)
class Halves:
    """Attention's forward and backward as two functions.

    q is [T, heads, D], k and v are [T_kv, kv_heads, D]. Rows that no sequence contains are not
    written; kernels may read them, so they must be finite, but they count for nothing.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Sequences, float], tuple[Tensor, Tensor]]
    """Function (q, k, v, sequences, scale) -> output [T, heads, D] and log-sums [heads, T] float32:
    natural logarithms of the sums of exponentials of a row's scores."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """Function (gradient, q, k, v, output, log-sums, sequences, scale) -> gradients of q, k and v.

    Output and log-sums may be those over further keys: then the gradients are the part that these
    keys contribute."""


@dataclass(frozen=True, slots=True)
class Widths:
    """One layer's attention, for an estimate of its memory."""

    queries: int
    """Number of elements of a token's queries."""
    keys: int
    """Number of elements of a token's keys, and of its values."""
    heads: int
    repeats: float
    """Tokens of keys and values for each token of the stream (PackedLayout.lengths)."""
    size: int
    """Bytes of an element."""


@dataclass(frozen=True, slots=True)
class AttentionMemory:
    """Bytes a token of one layer's attention."""

    kept: float
    """Kept by autograd from forward to backward, with the output."""
    work: float
    """Further ones in the backward."""
    buffers: float = 0.0
    """Further ones in the backward that shrink if it is computed in parts."""


def repeated_queries(w: Widths) -> AttentionMemory:
    """Estimate attention sequence by sequence, with prompts repeated in all three inputs."""
    # The output in the stream's order, the four tensors in the sequences' order, and log-sums.
    kept = w.queries * w.size + w.repeats * (2 * (w.queries + w.keys) * w.size + 4 * w.heads)
    # Gradients of the output, of queries, keys and values summed over the sequences, and the one
    # that is being added to them (all as long as the stream).
    return AttentionMemory(kept, (3 * w.queries + 2 * w.keys) * w.size)


def flash(w: Widths, *, expands: bool) -> AttentionMemory:
    """Estimate FlashAttention over sequences of varying length, with prompts repeated in keys.

    Args:
        w: the layer's widths.
        expands: keys and values are repeated for every query head.
    """
    keys = w.repeats * (w.queries if expands else w.keys)
    kept = (2 * w.queries + 2 * keys) * w.size + 4 * w.heads
    gradients = (2 * w.queries + 2 * keys) * w.size
    # Sums of the gradients in float32: of queries, and of keys and values that heads share.
    sums = 4 * w.queries + 8 * w.heads + (0 if expands or w.keys == w.queries else 8 * keys)
    return AttentionMemory(kept, gradients, sums)


@dataclass(frozen=True, slots=True)
class Backend:
    """An attention implementation and the conditions under which it can be used."""

    name: str
    """Value of ``--model.attention`` that selects the backend."""
    attend: Attend
    """The implementation."""
    works: Callable[[], bool]
    """Tells whether the backend runs on this machine; on a GPU, with 16-bit inputs."""
    starts_quickly: bool = False
    """Whether "auto" prefers the backend for small models, which do not repay a slow start."""
    takes: Callable[[Any], bool] = lambda _: True
    """Tells whether the backend supports the heads of a model with this text configuration.

    Only "auto" checks this.
    """
    halves: Halves | None = None
    """Forward and backward, if the backend has them apart: then attention's results can be kept."""
    memory: Callable[[Widths], AttentionMemory] = repeated_queries
    """Estimates the memory of training."""


def has_gpu(major: int) -> bool:
    """Tell whether there is a GPU with at least this major compute capability."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= major
