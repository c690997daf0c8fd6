"""GSPO (Zheng et al. 2025, arXiv:2507.18071, eq. 5): one clipped ratio a sequence.

Mean over rollouts. Sequence ratios lie much closer to 1 than token ratios: the paper
clips at epsilon_low 3e-4 and epsilon_high 4e-4 (§5.1).
"""

from rlsloth.losses.base import PolicyLoss, rollouts, sum_of_rollout_means
from rlsloth.losses.ratio import clipped_surrogate

GSPO = PolicyLoss(
    ratio="sequence",
    surrogate=clipped_surrogate,
    total=sum_of_rollout_means,
    normalizer=rollouts,
)
