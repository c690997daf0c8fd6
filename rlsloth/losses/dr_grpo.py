"""Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): token sums over a constant length.

Neither long nor short rollouts are favoured. Pairs with ``advantage.normalize: none``.
"""

from rlsloth.losses.base import PolicyLoss, sum_of_tokens
from rlsloth.losses.ratio import clipped_surrogate
from rlsloth.records import PackedBatch


def token_budget(batch: PackedBatch, max_tokens: int) -> int:
    """Tokens the step would hold if every rollout ran to the length limit."""
    return batch.rollouts * max_tokens


DR_GRPO = PolicyLoss(
    ratio="token",
    surrogate=clipped_surrogate,
    total=sum_of_tokens,
    normalizer=token_budget,
)
