"""Per-token estimates of KL(policy || reference) from sampled tokens.

Source: Schulman 2020, "Approximating KL Divergence".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlsloth.losses.ratio import LOG_RATIO_LIMIT


def kl_estimate(
    logprobs_N: Tensor, reference_logprobs_N: Tensor, kind: Literal["k1", "k2", "k3"]
) -> Tensor:
    """[N] estimates, differentiable with respect to ``logprobs_N``.

    With d = reference - policy: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. As a loss, k1 needs the
    ratio weight (kl_ratio_weighted): alone, its gradient is zero in expectation.
    """
    difference_N = reference_logprobs_N - logprobs_N
    match kind:
        case "k1":
            return -difference_N
        case "k2":
            return difference_N.square() / 2
        case "k3":
            difference_N = difference_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            return torch.expm1(difference_N) - difference_N
