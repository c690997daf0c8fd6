"""The policy loss of a micro-batch, and the normaliser of its step.

The gradient of a step is that of sum(totals) / normalizer, however the step is divided into
micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.config import LossConfig
from rlsloth.losses.base import PolicyLoss
from rlsloth.losses.bnpo import BNPO
from rlsloth.losses.cispo import CISPO
from rlsloth.losses.correction import correction_weight
from rlsloth.losses.dapo import DAPO
from rlsloth.losses.dr_grpo import DR_GRPO
from rlsloth.losses.grpo import GRPO
from rlsloth.losses.gspo import GSPO
from rlsloth.losses.kl import kl_estimate
from rlsloth.losses.ratio import importance_ratio
from rlsloth.records import LossOutput, LossStats, MicroBatch, PackedBatch

LOSSES: dict[str, PolicyLoss] = {
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "bnpo": BNPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
}


def policy_loss(
    logprobs_N: Tensor,
    micro: MicroBatch,
    cfg: LossConfig,
    *,
    old_logprobs_N: Tensor | None,
    reference_logprobs_N: Tensor | None,
) -> LossOutput:
    """The loss of one micro-batch, summed by the loss's own rule and not yet normalised.

    Only ``logprobs_N`` receives a gradient. With N = 0 the total is a differentiable zero.

    Args:
        logprobs_N: [N] the policy's log-probs of the scored tokens.
        old_logprobs_N: [N] the same before the step's first update. None: this is that update, so
            old is logprobs_N itself, detached, and every ratio is exactly 1.
        reference_logprobs_N: [N] those of the starting policy; needed when ``cfg.beta`` > 0.

    Raises:
        UserError: a setting that the chosen loss cannot honour.
    """
    loss = LOSSES[cfg.name]
    old_N = (logprobs_N if old_logprobs_N is None else old_logprobs_N).detach()
    ratio_N = importance_ratio(logprobs_N - old_N, micro, cfg.ratio or loss.ratio)
    surrogate = loss.surrogate(ratio_N, logprobs_N, micro.advantages, cfg)
    weight_N, corrected_N = correction_weight(old_N, micro, cfg)
    policy = loss.total(surrogate.loss * weight_N, micro)
    if cfg.beta > 0:
        assert reference_logprobs_N is not None, "beta > 0 needs the reference's log-probs"
        kl_N = kl_estimate(logprobs_N, reference_logprobs_N.detach(), cfg.kl)
        if cfg.kl_ratio_weighted:
            kl_N = kl_N * ratio_N
        total = policy + cfg.beta * loss.total(kl_N, micro)
    else:
        kl_N = torch.zeros_like(logprobs_N)
        total = policy
    sums = [
        policy,
        kl_N.sum(),
        surrogate.clipped_low.sum(),
        surrogate.clipped_high.sum(),
        ratio_N.sum(),
        weight_N.sum(),
        corrected_N.sum(),
    ]
    # One transfer: each .item() would wait for the device by itself.
    values = torch.stack([s.detach().to(logprobs_N.dtype) for s in sums]).tolist()
    policy_sum, kl, low, high, ratio, correction, corrected = values
    stats = LossStats(
        tokens=logprobs_N.numel(),
        policy=policy_sum,
        kl=kl,
        clipped_low=low,
        clipped_high=high,
        ratio=ratio,
        correction=correction,
        corrected=int(corrected),
    )
    return LossOutput(total=total, stats=stats)


def normalizer(batch: PackedBatch, cfg: LossConfig, *, max_tokens: int) -> float:
    """The divisor of a step's summed totals; every micro-batch of the step has this one.

    Args:
        max_tokens: longest completion allowed (``rollout.max_tokens``); used by dr_grpo.
    """
    return float(max(LOSSES[cfg.name].normalizer(batch, max_tokens), 1))
