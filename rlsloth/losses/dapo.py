"""DAPO's token-level loss (Yu et al. 2025, arXiv:2503.14476, eq. 12): mean over the step's tokens.

Clip-higher is ``epsilon_high: 0.28``; overlong shaping and filtering have settings of their own.
"""

from rlsloth.losses.base import PolicyLoss, scored_tokens, sum_of_tokens
from rlsloth.losses.ratio import clipped_surrogate

DAPO = PolicyLoss(
    ratio="token",
    surrogate=clipped_surrogate,
    total=sum_of_tokens,
    normalizer=scored_tokens,
)
