"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306): single completions labelled good or bad."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.losses.preference.base import LabelledLogps, Normalizer, PreferenceOutput, output
from rlsloth.losses.preference.methods import KtoLossConfig


def kl_baseline(policy_B: Tensor, reference_B: Tensor) -> Tensor:
    """[] detached estimate of KL(policy || starting policy), at least 0: the point that rewards are
    measured from (§4.1).

    Args:
        policy_B, reference_B: [B] summed log-probs of all the step's completions, each put after
            a prompt that is not its own. TRL makes one estimate per micro-batch.
    """
    return (policy_B - reference_B).detach().mean().clamp(min=0)


def kto_loss(logps: LabelledLogps, cfg: KtoLossConfig, normalizer: Normalizer) -> PreferenceOutput:
    """Eq. 7 without its constants: the weighted mean over the step's completions of
    1 - sigmoid(+-beta (log-ratio - kl)); a micro-batch's share.

    ``logps.kl`` is None for apo_zero_unpaired, which measures rewards from 0.
    """
    policy_B, desirable_B, kl = logps.policy, logps.desirable, logps.kl
    assert logps.reference is not None
    assert (kl is None) == (cfg.name == "apo_zero_unpaired")
    ratio_B = policy_B - logps.reference
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
