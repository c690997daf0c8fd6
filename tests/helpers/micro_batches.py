"""Micro-batches that hold only the tensors that losses read."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.records import MicroBatch, PackedBatch

EMPTY = torch.zeros(0, dtype=torch.int64)


def make_micro(lengths: list[int], advantages_N: Tensor, rollout_logprobs_N: Tensor) -> MicroBatch:
    """Make a micro-batch of rollouts from their numbers of scored tokens."""
    counts_R = torch.tensor(lengths, dtype=torch.int64)
    rollout_of_N = torch.repeat_interleave(torch.arange(len(lengths)), counts_R)
    return MicroBatch(
        token_ids=EMPTY,
        positions=EMPTY,
        cu_seqlens_q=EMPTY,
        kv_index=EMPTY,
        cu_seqlens_k=EMPTY,
        tree_of=EMPTY,
        score_index=EMPTY,
        target_ids=EMPTY,
        rollout_of=rollout_of_N,
        advantages=advantages_N,
        rollout_logprobs=rollout_logprobs_N,
        policy_version=torch.zeros_like(rollout_of_N),
        rollout_count=len(lengths),
        source=tuple((0, r) for r in range(len(lengths))),
    )


def make_batch(micros: list[MicroBatch], rollouts: int, scored_tokens: int) -> PackedBatch:
    trained = sum(m.rollout_of.numel() for m in micros)
    return PackedBatch(tuple(micros), rollouts, scored_tokens, trained, trained)
