"""Importance ratios per token or per sequence, and sums over rollouts. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rlsloth.records import MicroBatch

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 before exp (ratios to 5e8). exp would overflow to inf, and inf
times the zero gradient of a clipped branch is NaN. Beyond the limit the ratio is constant: no
gradient."""


def rollout_sum(values_N: Tensor, micro: MicroBatch) -> Tensor:
    """[N] -> [R]: sums over each rollout's tokens."""
    zeros_R = values_N.new_zeros(micro.rollout_count)
    return zeros_R.index_add(0, micro.rollout_of, values_N)


def rollout_mean(values_N: Tensor, micro: MicroBatch) -> Tensor:
    """[N] -> [R]: means over each rollout's tokens."""
    return rollout_sum(values_N, micro) / rollout_sum(values_N.new_ones(values_N.shape), micro)


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
