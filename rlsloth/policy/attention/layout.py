"""Places of a packed stream's segments, in the forms that attention backends want."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlsloth.records import MicroBatch

TREE_LIMIT = 1024
"""Tokens of the longest tree that is one masked square; longer ones go sequence by sequence."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Trees of similar length, each a masked square of width L."""

    index: Tensor
    """[B, L] stream rows of each tree, padded with 0."""
    mask: Tensor
    """[B, 1, L, L] bool: True where a row may see a column."""
    places: Tensor
    """[n] positions in the flattened [B, L] that are not padding."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """The stream with each prompt repeated before each of its completions: T_kv places."""

    index: Tensor
    """[T_kv] stream row of each place."""
    own: Tensor
    """[T] place of each stream row's first occurrence, in the stream's order."""
    again: Tensor
    """[T_kv - T] places of the repetitions."""


class PackedLayout:
    """A micro-batch's segments, on its device; each form is computed on first use."""

    def __init__(self, micro: MicroBatch, backend: str) -> None:
        self.backend = backend
        self.cu_q = micro.cu_seqlens_q
        self.cu_k = micro.cu_seqlens_k
        self.kv_index = micro.kv_index
        self.positions = micro.positions
        self._q, self._k = (cu.tolist() for cu in (self.cu_q, self.cu_k))
        self.lengths = [end - start for start, end in pairwise(self._k)]
        """Tokens of each segment together with its prompt."""
        self.max_k = max(self.lengths)
        self.max_q = max(end - start for start, end in pairwise(self._q))
        self._tree_of = micro.tree_of

    @cached_property
    def _segment(self) -> Tensor:
        """[T] segment of each stream row."""
        lengths = self.cu_q.diff().long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    @cached_property
    def _is_prompt(self) -> Tensor:
        """[S] True for each tree's first segment."""
        first = torch.ones_like(self._tree_of, dtype=torch.bool)
        first[1:] = self._tree_of[1:] != self._tree_of[:-1]
        return first

    @cached_property
    def _tree_sizes(self) -> Tensor:
        lengths = self.cu_q.diff().long()
        sizes = torch.zeros(int(self._tree_of[-1]) + 1, dtype=torch.long, device=lengths.device)
        return sizes.index_add_(0, self._tree_of, lengths)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Trees of up to TREE_LIMIT tokens, in buckets by the next power of two."""
        width = 2 ** torch.log2(self._tree_sizes.double().clamp(min=32)).ceil().long()
        width[self._tree_sizes > TREE_LIMIT] = 0
        widths = sorted(set(width.tolist()) - {0})
        return tuple(self._bucket((width == w).nonzero()[:, 0]) for w in widths)

    def _bucket(self, trees: Tensor) -> Bucket:
        sizes = self._tree_sizes[trees]
        start = (self._tree_sizes.cumsum(0) - self._tree_sizes)[trees]
        column = torch.arange(int(sizes.max()), device=trees.device)
        real = column[None, :] < sizes[:, None]
        index = torch.where(real, start[:, None] + column[None, :], 0)
        segment = torch.where(real, self._segment[index], -1)
        prompt = self._is_prompt[segment] & real
        mask = (segment[:, :, None] == segment[:, None, :]) | prompt[:, None, :]
        mask &= column[:, None] >= column[None, :]
        # Padding sees itself: a row that sees nothing is NaN, and NaN * 0 poisons the backward.
        mask |= torch.eye(len(column), dtype=torch.bool, device=trees.device)
        return Bucket(index, mask[:, None], real.flatten().nonzero()[:, 0])

    @cached_property
    def repeated(self) -> Repeated:
        """Indices that take a stream [T, ...] to [T_kv, ...] and back."""
        shift = (self.cu_k - self.cu_q)[1:].long()[self._segment]
        own = torch.arange(len(shift), device=shift.device) + shift
        others = torch.ones_like(self.kv_index, dtype=torch.bool)
        others[own] = False
        return Repeated(self.kv_index, own, others.nonzero()[:, 0])

    @cached_property
    def long_sequences(self) -> tuple[tuple[Tensor, int], ...]:
        """Segments of the trees over TREE_LIMIT, which are in no bucket: each as the stream rows
        of its prompt and itself, and how many of the last rows to keep."""
        long = (self._tree_sizes > TREE_LIMIT)[self._tree_of]
        q, k = self._q, self._k
        return tuple(
            (self.kv_index[k[s] : k[s + 1]], q[s + 1] - q[s]) for s in long.nonzero()[:, 0].tolist()
        )

    @cached_property
    def back(self) -> Tensor:
        """[T] index that puts the outputs of buckets, then of long_sequences, in stream order."""
        rows = [b.index.flatten()[b.places] for b in self.buckets]
        rows += [square[len(square) - keep :] for square, keep in self.long_sequences]
        return torch.cat(rows).argsort()

    @cached_property
    def block_mask(self) -> Any:
        """The mask for flex attention."""
        from torch.nn.attention.flex_attention import create_block_mask

        segment = self._segment
        tree = self._tree_of[segment]
        prompt = self._is_prompt[segment]

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            near = (segment[q] == segment[k]) | (prompt[k] & (tree[q] == tree[k]))
            return near & (q >= k)

        total = len(segment)
        return create_block_mask(visible, None, None, total, total, device=str(segment.device))
