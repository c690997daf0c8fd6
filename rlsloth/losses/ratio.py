"""Importance ratios per token or per sequence, and the clipped surrogate built on them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlsloth.config import LossConfig
from rlsloth.records import MicroBatch

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before exp (ratios to 5e8). exp would overflow to inf, and inf
times the zero gradient of a clipped branch is NaN. Beyond the limit the ratio is constant: no
gradient."""


class Surrogate(NamedTuple):
    """A loss's policy term for each token."""

    loss: Tensor
    """[N] to minimise; differentiable with respect to the log-probs."""
    clipped_low: Tensor
    """[N] bool: the ratio is clipped below."""
    clipped_high: Tensor
    """[N] bool: the ratio is clipped above."""


def rollout_sum(values_N: Tensor, micro: MicroBatch) -> Tensor:
    """[N] -> [R]: sums over each rollout's tokens."""
    zeros_R = values_N.new_zeros(micro.rollout_count)
    return zeros_R.index_add(0, micro.rollout_of, values_N)


def rollout_mean(values_N: Tensor, micro: MicroBatch) -> Tensor:
    """[N] -> [R]: means over each rollout's tokens."""
    return rollout_sum(values_N, micro) / rollout_sum(torch.ones_like(values_N), micro)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of the log-ratio clamped to +-LOG_RATIO_LIMIT."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def importance_ratio(
    log_ratio_N: Tensor, micro: MicroBatch, level: Literal["token", "sequence"]
) -> Tensor:
    """[N] ratios of the policy's probabilities to those before the step's first update.

    token: exp(log_ratio). sequence: exp of the rollout's mean log-ratio, the same for all its
    tokens (GSPO, Zheng et al. 2025, arXiv:2507.18071, eq. 7).
    """
    if level == "sequence":
        log_ratio_N = rollout_mean(log_ratio_N, micro)[micro.rollout_of]
    return bounded_exp(log_ratio_N)


def clipped_surrogate(
    ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor, cfg: LossConfig
) -> Surrogate:
    """-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) (PPO, arXiv:1707.06347, eq. 7).

    epsilon_high above epsilon_low is clip-higher (DAPO, arXiv:2503.14476, eq. 10). ``delta`` caps
    the unclipped ratio, which bounds the loss where advantages are negative (two-sided clipping,
    INTELLECT-2, arXiv:2505.07291); it is meant to exceed 1 + epsilon_high.
    """
    low = 1 - cfg.epsilon_low
    high = 1 + (cfg.epsilon_low if cfg.epsilon_high is None else cfg.epsilon_high)
    clipped_N = ratio_N.clamp(low, high)
    if cfg.delta is not None:
        ratio_N = ratio_N.clamp(max=cfg.delta)
    return Surrogate(
        loss=-torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N),
        clipped_low=(ratio_N < low) & (advantages_N < 0),
        clipped_high=(ratio_N > high) & (advantages_N > 0),
    )
