"""The positions of a packed stream's segments, in the forms that attention backends need.

A tree is a prompt with its completions, which all attend to that prompt. A segment is one prompt or
one completion. T is the number of tokens in the stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from rlsloth.records import MicroBatch

TREE_LIMIT = 1024
"""Tokens of the longest tree computed as one masked square; longer ones go by sequences."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Trees of similar length, each as a masked square of width L."""

    index: Tensor
    """[B, L] row of the stream at each position of each tree, padded with 0."""
    mask: Tensor
    """[B, 1, L, L] bool: True where a row sees a column."""
    places: Tensor
    """[n] positions in the flattened [B, L] that are not padding."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """Indices for the stream of T_kv positions that repeats each prompt before its completions."""

    index: Tensor
    """[T_kv] row of the packed stream at each position."""
    own: Tensor
    """[T] position of each row's first occurrence, in the order of the packed stream."""
    again: Tensor
    """[T_kv - T] positions of the repetitions."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequences of queries in one stream, each with its keys in another one."""

    cu_q: Tensor
    """[S + 1] int32: first row of each sequence's queries, and the end of the last one."""
    cu_k: Tensor
    """[S + 1] int32: boundaries of the sequences' keys."""
    max_q: int
    """Number of queries of the longest sequence."""
    max_k: int
    """Number of keys of the longest sequence."""
    causal: bool
    """Whether a row sees only keys up to its own position; the last row sees all keys."""
    used_q: Tensor | None = None
    """[S] int32: number of queries of each sequence; None: all up to the next one."""


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Prompts with several completions, as the keys of those completions."""

    first: int
    """First row of a completion; the rows below count from here."""
    rows: Tensor
    """[N] rows of the completions, less ``first``."""
    prompts: Tensor
    """[P] rows of the prompts in the stream."""
    sequences: Sequences
    """A sequence a tree: all its completions' queries, less ``first``, over the prompt's keys."""


class PackedLayout:
    """The segments of a micro-batch on its device; each form is computed when it is first used."""

    def __init__(self, micro: MicroBatch, backend: str) -> None:
        self.backend = backend
        self.cu_q = micro.cu_seqlens_q
        self.cu_k = micro.cu_seqlens_k
        self.kv_index = micro.kv_index
        self.positions = micro.positions
        self._q, self._k = (cu.tolist() for cu in (self.cu_q, self.cu_k))
        self.lengths = [end - start for start, end in pairwise(self._k)]
        """Number of tokens of each segment together with its prompt."""
        self.max_k = max(self.lengths)
        self.max_q = max(end - start for start, end in pairwise(self._q))
        self._tree_of = micro.tree_of

    @cached_property
    def own(self) -> Sequences:
        """Each segment over its own keys, without its prompt's."""
        return Sequences(self.cu_q, self.cu_q, self.max_q, self.max_q, causal=True)

    @cached_property
    def shared(self) -> SharedPrompts | None:
        """The prompts that completions share; None if no tree has more than one segment."""
        starts: list[int] = []
        used: list[int] = []
        prompts: list[tuple[int, int]] = []
        segment = 0
        for _, segments in groupby(self._tree_of.tolist()):
            begin, segment = segment, segment + len(list(segments))
            if segment - begin > 1:
                prompts.append((self._q[begin], self._q[begin + 1]))
                starts.append(self._q[begin + 1])
                used.append(self._q[segment] - starts[-1])
        if not prompts:
            return None
        first, device = starts[0], self.cu_q.device
        starts = [start - first for start in starts]

        def rows(ranges: Iterable[tuple[int, int]]) -> Tensor:
            return torch.cat([torch.arange(*each) for each in ranges]).to(device)

        def counts(numbers: Iterable[int]) -> Tensor:
            return torch.tensor(list(numbers), dtype=torch.int32, device=device)

        ends = [start + count for start, count in zip(starts, used, strict=True)]
        lengths = [end - begin for begin, end in prompts]
        sequences = Sequences(
            counts([*starts, ends[-1]]),
            counts(accumulate(lengths, initial=0)),
            max(used),
            max(lengths),
            causal=False,
            used_q=counts(used),
        )
        return SharedPrompts(first, rows(zip(starts, ends, strict=True)), rows(prompts), sequences)

    @cached_property
    def _segment(self) -> Tensor:
        """[T] number of each row's segment."""
        lengths = self.cu_q.diff().long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    @cached_property
    def _is_prompt(self) -> Tensor:
        """[S] bool: True for each tree's first segment, its prompt."""
        first = torch.ones_like(self._tree_of, dtype=torch.bool)
        first[1:] = self._tree_of[1:] != self._tree_of[:-1]
        return first

    @cached_property
    def _tree_sizes(self) -> Tensor:
        """[trees] number of tokens of each tree."""
        lengths = self.cu_q.diff().long()
        sizes = torch.zeros(int(self._tree_of[-1]) + 1, dtype=torch.long, device=lengths.device)
        return sizes.index_add_(0, self._tree_of, lengths)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Trees of up to TREE_LIMIT tokens, grouped by their length's next power of two."""
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
        # Padding sees itself: the softmax of a row that sees nothing is NaN, and NaN * 0 would
        # spoil the backward pass.
        mask |= torch.eye(len(column), dtype=torch.bool, device=trees.device)
        return Bucket(index, mask[:, None], real.flatten().nonzero()[:, 0])

    @cached_property
    def repeated(self) -> Repeated:
        """Indices that repeat prompts in a stream, from [T, ...] to [T_kv, ...] and back."""
        shift = (self.cu_k - self.cu_q)[1:].long()[self._segment]
        own = torch.arange(len(shift), device=shift.device) + shift
        again = torch.ones_like(self.kv_index, dtype=torch.bool)
        again[own] = False
        return Repeated(self.kv_index, own, again.nonzero()[:, 0])

    @cached_property
    def long_sequences(self) -> tuple[tuple[Tensor, int], ...]:
        """Segments of trees longer than TREE_LIMIT, which are in no bucket.

        Each is a pair: the rows of its prompt and of itself, and the number of rows at their end
        that are its own.
        """
        long = (self._tree_sizes > TREE_LIMIT)[self._tree_of]
        q, k = self._q, self._k
        return tuple(
            (self.kv_index[k[s] : k[s + 1]], q[s + 1] - q[s]) for s in long.nonzero()[:, 0].tolist()
        )

    @cached_property
    def back(self) -> Tensor:
        """[T] index that puts outputs of ``buckets``, then ``long_sequences``, in stream order."""
        rows = [b.index.flatten()[b.places] for b in self.buckets]
        rows += [square[len(square) - keep :] for square, keep in self.long_sequences]
        return torch.cat(rows).argsort()

    @cached_property
    def block_mask(self) -> Any:
        """Block mask of the trees for flex attention."""
        from torch.nn.attention.flex_attention import create_block_mask

        segment = self._segment
        tree = self._tree_of[segment]
        prompt = self._is_prompt[segment]

        def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            near = (segment[q] == segment[k]) | (prompt[k] & (tree[q] == tree[k]))
            return near & (q >= k)

        total = len(segment)
        return create_block_mask(visible, None, None, total, total, device=str(segment.device))
