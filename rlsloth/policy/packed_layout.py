"""Where the segments of a packed stream lie, in the forms that attention backends want."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlsloth.records import MicroBatch

TREE_LIMIT = 2048
"""Longest tree that SDPA takes as one masked square; longer ones go sequence by sequence."""


class PackedLayout:
    """A micro-batch's segments, on its device. Each form is made when a backend first asks for
    it."""

    def __init__(self, micro: MicroBatch, backend: str) -> None:
        self._micro = micro
        self.cu_q = micro.cu_seqlens_q
        self.cu_k = micro.cu_seqlens_k
        self.kv_index = micro.kv_index
        self.positions = micro.positions
        self.max_q = int(self.cu_q.diff().max())
        self.max_k = int(self.cu_k.diff().max())
        long = backend == "sdpa" and int(self._tree_sizes.max()) > TREE_LIMIT
        self.backend = "sequences" if long else backend

    @cached_property
    def _tree_sizes(self) -> Tensor:
        tree_of = self._micro.tree_of
        lengths = self.cu_q.diff().long()
        sizes = torch.zeros(int(tree_of[-1]) + 1, dtype=torch.long, device=lengths.device)
        return sizes.index_add_(0, tree_of, lengths)

    @cached_property
    def _segment(self) -> Tensor:
        """[T] segment of each stream row."""
        lengths = self.cu_q.diff().long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    @cached_property
    def _is_prompt(self) -> Tensor:
        """[S] True for each tree's first segment."""
        tree_of = self._micro.tree_of
        first = torch.ones_like(tree_of, dtype=torch.bool)
        first[1:] = tree_of[1:] != tree_of[:-1]
        return first

    @cached_property
    def trees(self) -> tuple[Tensor, Tensor, Tensor]:
        """One masked square a tree, padded to the longest of B.

        Returns:
            [B, L] stream rows of each tree (padding: 0); [B, 1, L, L] bool, True where a row may
            see a column; [T] place of each stream row in the flattened [B, L].
        """
        sizes, segment = self._tree_sizes, self._segment
        count, longest = len(sizes), int(sizes.max())
        tree = self._micro.tree_of[segment]
        start = sizes.cumsum(0) - sizes
        order = torch.arange(len(segment), device=segment.device)
        rows = tree * longest + order - start[tree]
        index = torch.zeros(count * longest, dtype=torch.long, device=segment.device)
        index[rows] = order
        padded = torch.full((count * longest,), -1, device=segment.device)
        padded[rows] = segment
        padded = padded.view(count, longest)
        prompt = self._is_prompt[padded.clamp(min=0)] & (padded >= 0)
        mask = (padded[:, :, None] == padded[:, None, :]) | prompt[:, None, :]
        column = torch.arange(longest, device=segment.device)
        mask &= column[:, None] >= column[None, :]
        # Padding sees itself: a row that sees nothing is NaN, and NaN * 0 poisons the backward
        # pass.
        mask |= torch.eye(longest, dtype=torch.bool, device=segment.device)
        return index.view(count, longest), mask[:, None], rows

    @cached_property
    def sequences(self) -> tuple[tuple[Tensor, int], ...]:
        """Each segment as a square over prompt and own rows: (stream rows, how many last ones to
        keep)."""
        q, k = self.cu_q.tolist(), self.cu_k.tolist()
        return tuple((self.kv_index[k[s] : k[s + 1]], q[s + 1] - q[s]) for s in range(len(q) - 1))

    @cached_property
    def block_mask(self) -> Any:
        """flex attention's mask."""
        from torch.nn.attention.flex_attention import create_block_mask

        segment = self._segment
        tree = self._micro.tree_of[segment]
        prompt = self._is_prompt[segment]

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            near = (segment[q] == segment[k]) | (prompt[k] & (tree[q] == tree[k]))
            return near & (q >= k)

        total = len(segment)
        return create_block_mask(visible, None, None, total, total, device=str(segment.device))
