"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306): single completions marked good or bad."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.config.preference_losses import KtoLossConfig
from rlsloth.losses.preference.base import Normalizer, PreferenceOutput, output


def kl_baseline(policy_B: Tensor, reference_B: Tensor) -> Tensor:
    """[] detached estimate of KL(policy || starting policy), at least 0: the point that rewards are
    measured from (§4.1).

    Args:
        policy_B, reference_B: [B] summed log-probs of completions put after prompts that are not
            theirs, for all of the step. TRL estimates it anew for each micro-batch.
    """
    return (policy_B - reference_B).detach().mean().clamp(min=0)


def kto_loss(
    policy_B: Tensor,
    reference_B: Tensor,
    desirable_B: Tensor,
    kl: Tensor | None,
    cfg: KtoLossConfig,
    normalizer: Normalizer,
) -> PreferenceOutput:
    """Eq. 7 without its constants: the weighted mean over the step's completions of
    1 - sigmoid(+-beta (log-ratio - kl)); a micro-batch's share.

    Args:
        policy_B: [B] summed log-probs of the completions, differentiable.
        reference_B: [B] the same under the starting policy.
        desirable_B: [B] bool: marked good.
        kl: [] from ``kl_baseline``, the same for all of the step; None for apo_zero_unpaired, which
            measures rewards from 0.
    """
    assert (kl is None) == (cfg.name == "apo_zero_unpaired")
    ratio_B = policy_B - reference_B
    reward_B = cfg.beta * ratio_B
    value_B = reward_B if kl is None else cfg.beta * (ratio_B - kl)
    loss_B = torch.sigmoid(torch.where(desirable_B, -value_B, value_B))
    weight_B = torch.full_like(loss_B, cfg.undesirable_weight)
    weight_B = weight_B.masked_fill(desirable_B, cfg.desirable_weight)
    total = (weight_B * loss_B).sum() / normalizer.examples
    sums: dict[str, tuple[Tensor, Tensor | int]] = {} if kl is None else {"kl": (kl, 1)}
    for side, on_B in (("chosen", desirable_B), ("rejected", ~desirable_B)):
        count = on_B.sum()
        sums[f"rewards/{side}"] = ((reward_B * on_B).sum(), count)
        sums[f"logps/{side}"] = ((policy_B * on_B).sum(), count)
    return output(total, sums)
