"""What a policy loss is made of: surrogate, sum over tokens, normaliser of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlsloth.config import LossConfig
from rlsloth.losses.ratio import Surrogate, rollout_mean
from rlsloth.records import MicroBatch, PackedBatch


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """One entry of ``LOSSES``."""

    ratio: Literal["token", "sequence"]
    """Level of the importance ratio when the configuration names none."""
    surrogate: Callable[[Tensor, Tensor, Tensor, LossConfig], Surrogate]
    """(ratio_N, logprobs_N, advantages_N, cfg) -> the policy term of each token."""
    total: Callable[[Tensor, MicroBatch], Tensor]
    """[N] -> []: sum over the micro-batch, before the normaliser."""
    normalizer: Callable[[PackedBatch, int], int]
    """(batch, max_tokens) -> what the whole step's sum is divided by."""


def sum_of_tokens(values_N: Tensor, micro: MicroBatch) -> Tensor:
    """[N] -> []: every token weighs the same."""
    return values_N.sum()


def sum_of_rollout_means(values_N: Tensor, micro: MicroBatch) -> Tensor:
    """[N] -> []: every rollout weighs the same, however long."""
    return rollout_mean(values_N, micro).sum()


def rollouts(batch: PackedBatch, max_tokens: int) -> int:
    """Rollouts of the step, those without loss included, as in TRL's mean over rows."""
    return batch.rollouts


def scored_tokens(batch: PackedBatch, max_tokens: int) -> int:
    """Tokens of the step that are not masked out (TRL's ``num_items_in_batch``)."""
    return batch.scored_tokens
