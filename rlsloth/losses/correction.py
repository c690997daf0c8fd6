"""Weights against the mismatch between the rollout engine's log-probs and the trainer's own."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.config import LossConfig
from rlsloth.losses.ratio import bounded_exp, rollout_sum
from rlsloth.records import MicroBatch


def correction_weight(
    old_logprobs_N: Tensor, micro: MicroBatch, cfg: LossConfig
) -> tuple[Tensor, Tensor]:
    """[N] weights of the policy term, and [N] bool: which of them were truncated or masked.

    The ratio is exp(old - rollout) per token, or per sequence the product of that over its tokens
    (not their geometric mean: TRL's definition). truncate clamps it to
    [correction_min, correction_max] (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training"); mask zeroes what lies outside. A rollout log-prob that is NaN (the
    engine could not say) counts as a ratio of 1.

    Args:
        old_logprobs_N: [N] the trainer's detached log-probs before the step's first update.
    """
    if cfg.correction == "none":
        return torch.ones_like(old_logprobs_N), torch.zeros_like(old_logprobs_N, dtype=torch.bool)
    level, bound = cfg.correction.split("_")
    difference_N = old_logprobs_N - micro.rollout_logprobs
    log_ratio_N = difference_N.masked_fill(difference_N.isnan(), 0.0)
    if level == "sequence":
        log_ratio_N = rollout_sum(log_ratio_N, micro)[micro.rollout_of]
    ratio_N = bounded_exp(log_ratio_N)
    low = 0.0 if cfg.correction_min is None else cfg.correction_min
    outside_N = (ratio_N < low) | (ratio_N > cfg.correction_max)
    if bound == "mask":
        return ratio_N.masked_fill(outside_N, 0.0), outside_N
    return ratio_N.clamp(low, cfg.correction_max), outside_N
