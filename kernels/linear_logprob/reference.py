"""linear_logprob on full logits in plain torch, in any dtype: the reference for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprob_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each target's log-probability, entropy and logsumexp, all [N] in the inputs' dtype.

    ``logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature``;
    without a softcap, ``logit_scale * (hidden @ weight.T + bias) / temperature``.
    """
    logits_NV = hidden_NH @ weight_VH.t()
    if bias_V is not None:
        logits_NV = logits_NV + bias_V
    logits_NV = logits_NV * logit_scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logits_NV = logits_NV / temperature
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    logprob_N = logprobs_NV.gather(1, target_N[:, None]).squeeze(1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV.clamp_min(torch.finfo(logits_NV.dtype).min)).sum(
        1
    )
    return logprob_N, entropy_N, torch.logsumexp(logits_NV, dim=-1)
