"""From scored groups to padding-free micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlsloth.records import Group, MicroBatch, PackedBatch, Rollout


@dataclass(frozen=True, slots=True)
class _Tree:
    """A prompt and some of its rollouts: the unit that is packed whole."""

    group: int
    rollouts: tuple[int, ...]
    tokens: int


def pack(
    groups: Sequence[Group],
    tokens_per_microbatch: int,
    *,
    mask_truncated: bool,
    keep_zero_advantage: bool,
) -> PackedBatch:
    """Cut a step's rollouts into micro-batches of at most ``tokens_per_microbatch`` stream tokens.

    A group's prompt stands once per micro-batch that holds some of its rollouts. Rollouts whose
    loss is zero by construction are counted but not packed: those masked out (``mask_truncated``)
    and, unless ``keep_zero_advantage`` (a KL term has gradient at advantage 0 too), those with
    advantage 0.

    A rollout that exceeds the budget even alone gets a micro-batch of its own.
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
            if rollout.length and (keep_zero_advantage or rollout.advantage != 0.0):
                packed.append(r)
        trees += _split(g, group, packed, tokens_per_microbatch)
    micros = tuple(_microbatch(groups, bin_) for bin_ in _first_fit(trees, tokens_per_microbatch))
    return PackedBatch(micros, rollouts, scored, sum(len(m.target_ids) for m in micros))


def _stream_length(rollout: Rollout) -> int:
    """Tokens of a rollout that are fed to the model: all before its last scored one."""
    return max(i for i, scored in enumerate(rollout.loss_mask) if scored)


def _split(g: int, group: Group, packed: list[int], budget: int) -> list[_Tree]:
    """Cut a group's rollouts into runs that fit the budget together with the prompt."""
    trees: list[_Tree] = []
    prompt = len(group.prompt_ids)
    run: list[int] = []
    tokens = prompt
    for r in packed:
        length = _stream_length(group.rollouts[r])
        if run and tokens + length > budget:
            trees.append(_Tree(g, tuple(run), tokens))
            run, tokens = [], prompt
        run.append(r)
        tokens += length
    if run:
        trees.append(_Tree(g, tuple(run), tokens))
    return trees


def _first_fit(trees: list[_Tree], budget: int) -> list[list[_Tree]]:
    """First-fit decreasing: at most 22 % more bins than the optimum (Johnson 1973)."""
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
    tokens: list[int] = []
    positions: list[int] = []
    cu_q, cu_k = [0], [0]
    kv_index: list[int] = []
    tree_of: list[int] = []
    score_index: list[int] = []
    targets: list[int] = []
    rollout_of: list[int] = []
    advantages: list[float] = []
    logprobs: list[float] = []
    versions: list[int] = []
    source: list[tuple[int, int]] = []

    def segment(ids: list[int], first_position: int, prefix: range, tree: int) -> range:
        start = len(tokens)
        own = range(start, start + len(ids))
        tokens.extend(ids)
        positions.extend(range(first_position, first_position + len(ids)))
        kv_index.extend(prefix)
        kv_index.extend(own)
        cu_q.append(len(tokens))
        cu_k.append(len(kv_index))
        tree_of.append(tree)
        return own

    for t, tree in enumerate(trees):
        group = groups[tree.group]
        prompt = segment(group.prompt_ids, 0, range(0), t)
        for r in tree.rollouts:
            rollout = group.rollouts[r]
            fed = _stream_length(rollout)
            own = segment(rollout.token_ids[:fed], len(prompt), prompt, t) if fed else range(0)
            scored = [j for j, on in enumerate(rollout.loss_mask) if on]
            # Token j is predicted by the state before it; the first by the prompt's last token.
            score_index.extend(own[j - 1] if j else prompt[-1] for j in scored)
            targets.extend(rollout.token_ids[j] for j in scored)
            rollout_of.extend([len(source)] * len(scored))
            advantages.extend([rollout.advantage] * len(scored))
            logprobs.extend(rollout.logprobs[j] for j in scored)
            versions.extend(rollout.policy_version[j] for j in scored)
            source.append((tree.group, r))

    return MicroBatch(
        token_ids=torch.tensor(tokens),
        positions=torch.tensor(positions),
        cu_seqlens_q=torch.tensor(cu_q, dtype=torch.int32),
        kv_index=torch.tensor(kv_index),
        cu_seqlens_k=torch.tensor(cu_k, dtype=torch.int32),
        tree_of=torch.tensor(tree_of),
        score_index=torch.tensor(score_index),
        target_ids=torch.tensor(targets),
        rollout_of=torch.tensor(rollout_of),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        rollout_logprobs=torch.tensor(logprobs, dtype=torch.float32),
        policy_version=torch.tensor(versions),
        rollout_count=len(source),
        source=tuple(source),
    )


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """The same micro-batch with its tensors on ``device``."""
    if device.type == "cpu":
        return micro
    moved: dict[str, Any] = {
        name: value.to(device, non_blocking=True)
        for name in MicroBatch.__slots__
        if isinstance(value := getattr(micro, name), torch.Tensor)
    }
    return replace(micro, **moved)
