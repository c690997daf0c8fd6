"""BNPO (TRL's name): mean over the tokens of the batch.

TRL takes the mean of each micro-batch by itself, so its result depends on how the batch is cut.
Here the batch is the whole step, which makes this loss the same as DAPO's; it equals TRL's where
that has one micro-batch a step.
"""

from rlsloth.losses.base import PolicyLoss, scored_tokens, sum_of_tokens
from rlsloth.losses.ratio import clipped_surrogate

BNPO = PolicyLoss(
    ratio="token",
    surrogate=clipped_surrogate,
    total=sum_of_tokens,
    normalizer=scored_tokens,
)
