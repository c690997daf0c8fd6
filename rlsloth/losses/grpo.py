"""GRPO (Shao et al. 2024, arXiv:2402.03300, eq. 3): mean over a rollout's tokens, then rollouts."""

from rlsloth.losses.base import PolicyLoss, rollouts, sum_of_rollout_means
from rlsloth.losses.ratio import clipped_surrogate

GRPO = PolicyLoss(
    ratio="token",
    surrogate=clipped_surrogate,
    total=sum_of_rollout_means,
    normalizer=rollouts,
)
