"""Pack scored groups into micro-batches without padding, under a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlsloth.records import Group, MicroBatch, PackedBatch, Rollout

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class _Tree:
    """A prompt with some of its rollouts, which are packed into one micro-batch."""

    group: int
    """Index of the group in the step."""
    rollouts: tuple[int, ...]
    """Indices of the rollouts in the group."""
    tokens: int
    """Number of tokens in the stream."""


def pack(
    groups: Sequence[Group],
    tokens_per_microbatch: int,
    *,
    mask_truncated: bool,
    keep_zero_advantage: bool,
    whole_groups: bool = False,
) -> PackedBatch:
    """Divide a step's rollouts into micro-batches.

    A group's prompt occurs once in each micro-batch that contains some of its rollouts. Rollouts
    without gradient are counted but not packed. A rollout that exceeds the budget alone gets a
    micro-batch of its own.

    Args:
        groups: the step's groups, with advantages.
        tokens_per_microbatch: largest number of tokens in a micro-batch's stream.
        mask_truncated: leave out rollouts that the length limit cut off.
        keep_zero_advantage: also pack rollouts whose advantages are all 0; a KL term has a gradient
            for them.
        whole_groups: never divide a group, as preference pairs need it; a group that exceeds the
            budget then gets a micro-batch of its own.
    """
    trees: list[_Tree] = []
    rollouts = scored = 0
    for g, group in enumerate(groups):
        packed: list[int] = []
        for r, rollout in enumerate(group.rollouts):
            rollouts += 1
            if mask_truncated and rollout.truncated:
                continue
            scored += rollout.length
            if rollout.length and (keep_zero_advantage or any(rollout.advantages)):
                packed.append(r)
        budget = None if whole_groups else tokens_per_microbatch
        trees += _split(g, group, packed, budget)
    micros = tuple(_microbatch(groups, bin_) for bin_ in _first_fit(trees, tokens_per_microbatch))
    trained = sum(len(m.target_ids) for m in micros)
    return PackedBatch(micros, rollouts, scored, trained, tokens_per_microbatch)


def _stream_length(rollout: Rollout) -> int:
    """Count the tokens of a rollout that the model reads: all before its last scored token."""
    return len(rollout.loss_mask) - 1 - rollout.loss_mask[::-1].index(True)


def _split(g: int, group: Group, packed: list[int], budget: int | None) -> list[_Tree]:
    """Divide a group's rollouts into trees that fit the budget together with the prompt.

    Args:
        g: index of the group in the step.
        group: the group.
        packed: indices of the rollouts to pack.
        budget: largest number of tokens of a tree; None for a single tree.
    """
    trees: list[_Tree] = []
    prompt = len(group.prompt_ids)
    run: list[int] = []
    tokens = prompt
    for r in packed:
        length = _stream_length(group.rollouts[r])
        if run and budget is not None and tokens + length > budget:
            trees.append(_Tree(g, tuple(run), tokens))
            run, tokens = [], prompt
        run.append(r)
        tokens += length
    if run:
        trees.append(_Tree(g, tuple(run), tokens))
    return trees


def _first_fit(trees: list[_Tree], budget: int) -> list[list[_Tree]]:
    """Distribute trees over micro-batches by first-fit decreasing.

    This needs at most 22 % more micro-batches than the optimum (Johnson 1973).
    """
    bins: list[list[_Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=lambda t: -t.tokens):
        slot = next((i for i, free in enumerate(room) if tree.tokens <= free), None)
        if slot is None:
            bins.append([])
            room.append(budget)
            slot = len(bins) - 1
        bins[slot].append(tree)
        room[slot] -= tree.tokens
    return bins


def _microbatch(groups: Sequence[Group], trees: list[_Tree]) -> MicroBatch:
    stream = _Stream()
    counts: list[int] = []
    source: list[tuple[int, int]] = []
    for t, tree in enumerate(trees):
        group = groups[tree.group]
        ids = np.array(group.prompt_ids, np.int64)
        rollouts = [group.rollouts[r] for r in tree.rollouts]
        if len(rollouts) == 1:
            # A prompt with one rollout needs no segment of its own, so that no keys are gathered.
            counts.append(stream.alone(rollouts[0], ids, t))
        else:
            prompt = stream.prompt(ids, t)
            counts += [stream.rollout(rollout, prompt, t) for rollout in rollouts]
        source += [(tree.group, r) for r in tree.rollouts]
    scored = torch.tensor(counts)
    return MicroBatch(
        token_ids=_joined(stream.tokens),
        positions=_joined(stream.positions),
        cu_seqlens_q=torch.tensor(stream.cu_q, dtype=torch.int32),
        kv_index=_joined(stream.kv_index),
        cu_seqlens_k=torch.tensor(stream.cu_k, dtype=torch.int32),
        tree_of=torch.tensor(stream.tree_of),
        score_index=_joined(stream.score_index),
        target_ids=_joined(stream.targets),
        rollout_of=torch.arange(len(source)).repeat_interleave(scored),
        advantages=_joined(stream.advantages),
        rollout_logprobs=_joined(stream.logprobs),
        policy_version=_joined(stream.versions),
        rollout_count=len(source),
        source=tuple(source),
    )


class _Stream:
    """A micro-batch under construction, as lists of arrays that are joined at the end.

    Lists of numbers would be slow: a step may have half a million tokens.
    """

    def __init__(self) -> None:
        self.tokens: list[Array] = []
        self.positions: list[Array] = []
        self.cu_q, self.cu_k = [0], [0]
        self.kv_index: list[Array] = []
        self.tree_of: list[int] = []
        self.score_index: list[Array] = []
        self.targets: list[Array] = []
        self.advantages: list[Array] = []
        self.logprobs: list[Array] = []
        self.versions: list[Array] = []

    def prompt(self, ids: Array, tree: int) -> Array:
        """Add a prompt as a segment of its own; return its positions, which ``rollout`` takes."""
        return self._segment(ids, 0, np.arange(0), tree)

    def rollout(self, rollout: Rollout, prompt: Array, tree: int) -> int:
        """Add a rollout as a segment that also sees its prompt; return its scored tokens' count."""
        ids, fed = np.array(rollout.token_ids, np.int64), _stream_length(rollout)
        start = self.cu_q[-1]
        if fed:
            self._segment(ids[:fed], len(prompt), prompt, tree)
        scored = np.flatnonzero(np.array(rollout.loss_mask))
        # Token j is predicted by the state before it; the first by the prompt's last token.
        at = np.where(scored > 0, start + scored - 1, prompt[-1])
        self._score(rollout, ids, scored, at)
        return len(scored)

    def alone(self, rollout: Rollout, prompt_ids: Array, tree: int) -> int:
        """Add a prompt and its only rollout as one segment; return its count of scored tokens."""
        ids = np.array(rollout.token_ids, np.int64)
        fed = np.concatenate([prompt_ids, ids[: _stream_length(rollout)]])
        start = self.cu_q[-1] + len(prompt_ids)
        self._segment(fed, 0, np.arange(0), tree)
        scored = np.flatnonzero(np.array(rollout.loss_mask))
        self._score(rollout, ids, scored, start + scored - 1)
        return len(scored)

    def _score(self, rollout: Rollout, ids: Array, scored: Array, at: Array) -> None:
        self.score_index.append(at)
        self.targets.append(ids[scored])
        self.advantages.append(_advantages(rollout)[scored])
        self.logprobs.append(np.array(rollout.logprobs, np.float32)[scored])
        self.versions.append(np.array(rollout.policy_version, np.int64)[scored])

    def _segment(self, ids: Array, first_position: int, prefix: Array, tree: int) -> Array:
        start, count = self.cu_q[-1], len(ids)
        own = np.arange(start, start + count)
        self.tokens.append(ids)
        self.positions.append(np.arange(first_position, first_position + count))
        self.kv_index += [prefix, own]
        self.cu_q.append(start + count)
        self.cu_k.append(self.cu_k[-1] + len(prefix) + count)
        self.tree_of.append(tree)
        return own


def _advantages(rollout: Rollout) -> Array:
    """Return the advantages [tokens]; zeros if none are assigned, as in supervised examples."""
    if not rollout.advantages:
        return np.zeros(len(rollout.token_ids), np.float32)
    return np.array(rollout.advantages, np.float32)


def _joined(parts: list[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def longest_stream(batch: PackedBatch) -> int:
    """Return the number of tokens in the longest stream of all micro-batches."""
    return max((len(micro.token_ids) for micro in batch.microbatches), default=0)


def regroup(values: Sequence[Tensor], before: PackedBatch, after: PackedBatch) -> list[Tensor]:
    """Distribute values of scored tokens over other micro-batches of the same rollouts.

    Args:
        values: [N] values of each micro-batch of ``before``.
        before: the step as it was packed.
        after: the step as it is packed now.
    """
    found: dict[tuple[int, int], Tensor] = {}
    for micro, value in zip(before.microbatches, values, strict=True):
        counts = torch.bincount(micro.rollout_of, minlength=micro.rollout_count).tolist()
        parts = torch.split(value, counts)
        found |= dict(zip(micro.source, parts, strict=True))
    return [torch.cat([found[one] for one in micro.source]) for micro in after.microbatches]


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """Copy a micro-batch's tensors to ``device``."""
    if device.type == "cpu":
        return micro
    moved: dict[str, Any] = {
        name: value.to(device, non_blocking=True)
        for name in MicroBatch.__slots__
        if isinstance(value := getattr(micro, name), torch.Tensor)
    }
    return replace(micro, **moved)
