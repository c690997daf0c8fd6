"""CISPO (MiniMax-M1, arXiv:2506.13585): REINFORCE weighted by a capped, detached ratio.

Mean over all tokens of the step. No token loses its gradient to the clip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.config import LossConfig
from rlsloth.losses.base import PolicyLoss, scored_tokens, sum_of_tokens
from rlsloth.losses.ratio import Surrogate

DEFAULT_CAP = 5.0
"""ScaleRL (arXiv:2510.13786) and TRL's documentation recommend it. TRL's own default falls back to
the lower epsilon, 0.2, which would shrink every on-policy token's gradient fivefold."""


def capped_reinforce(
    ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor, cfg: LossConfig
) -> Surrogate:
    """-min(r, epsilon_high).detach() A log p.

    epsilon_high caps the ratio itself, as in TRL, not its excess over 1; there is no lower clip.
    Tokens of both signs of advantage are capped, and counted when they are.
    """
    cap = DEFAULT_CAP if cfg.epsilon_high is None else cfg.epsilon_high
    ratio_N = ratio_N.detach()
    return Surrogate(
        loss=-ratio_N.clamp(max=cap) * advantages_N * logprobs_N,
        clipped_low=torch.zeros_like(ratio_N, dtype=torch.bool),
        clipped_high=ratio_N > cap,
    )


CISPO = PolicyLoss(
    ratio="token",
    surrogate=capped_reinforce,
    total=sum_of_tokens,
    normalizer=scored_tokens,
)
