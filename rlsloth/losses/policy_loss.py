"""The policy loss of a micro-batch, and the normaliser of its step.

The gradient of a step is that of sum(totals) / normalizer, however the step is divided into
micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.config import LossConfig
from rlsloth.losses.base import PolicyLoss, ScoredTokens, Surrogate
from rlsloth.losses.correction import correction_weight
from rlsloth.losses.kl import kl_estimate
from rlsloth.losses.ratio import importance_ratio
from rlsloth.records import LossOutput, LossStats, MicroBatch, PackedBatch


def policy_loss(
    loss: PolicyLoss,
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
        loss: as ``open_loss`` returns it.
        logprobs_N: [N] the policy's log-probs of the scored tokens.
        old_logprobs_N: [N] these before the step's first update. None: this is that update, so
            old is logprobs_N itself, detached, and every ratio is exactly 1.
        reference_logprobs_N: [N] those of the starting policy; needed when ``cfg.beta`` > 0.

    Raises:
        UserError: a loss of the user's own failed.
    """
    old_N = (logprobs_N if old_logprobs_N is None else old_logprobs_N).detach()
    ratio_N = importance_ratio(logprobs_N - old_N, micro, cfg.ratio or loss.ratio)
    found = loss.surrogate(ScoredTokens(logprobs_N, old_N, ratio_N, micro), cfg)
    surrogate = found if isinstance(found, Surrogate) else Surrogate(found)
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
    stats = _stats(logprobs_N, surrogate, ratio_N, policy, kl_N, weight_N, corrected_N)
    return LossOutput(total=total, stats=stats)


def _stats(
    logprobs_N: Tensor,
    surrogate: Surrogate,
    ratio_N: Tensor,
    policy: Tensor,
    kl_N: Tensor,
    weight_N: Tensor,
    corrected_N: Tensor,
) -> LossStats:
    """Detached sums over the micro-batch, in one transfer: each .item() would wait for the device
    by itself."""
    sums = [
        policy,
        kl_N.sum(),
        _count(surrogate.clipped_low, logprobs_N),
        _count(surrogate.clipped_high, logprobs_N),
        ratio_N.sum(),
        weight_N.sum(),
        corrected_N.sum(),
    ]
    values = torch.stack([s.detach().to(logprobs_N.dtype) for s in sums]).tolist()
    policy_sum, kl, low, high, ratio, correction, corrected = values
    return LossStats(
        tokens=logprobs_N.numel(),
        policy=policy_sum,
        kl=kl,
        clipped_low=low,
        clipped_high=high,
        ratio=ratio,
        correction=correction,
        corrected=int(corrected),
    )


def _count(mask_N: Tensor | None, like: Tensor) -> Tensor:
    """[] how many are True; 0 without a mask."""
    return like.new_zeros(()) if mask_N is None else mask_N.sum()


def normalizer(loss: PolicyLoss, batch: PackedBatch, *, max_tokens: int) -> float:
    """The divisor of a step's summed totals, at least 1; all micro-batches of the step share it.

    Args:
        max_tokens: longest completion allowed (``rollout.max_tokens``); used by dr_grpo.
    """
    return float(max(loss.normalizer(batch, max_tokens), 1))
