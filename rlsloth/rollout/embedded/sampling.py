"""Drawing one token a row from logits, reproducibly and independent of how rows are batched."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.records import SamplingParams


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token a row by inverse-CDF sampling, and its log-prob under the distribution drawn from.

    Args:
        logits_BV: float32, overwritten.
        uniform_B: numbers in [0, 1), one a row: each sequence has its own stream of them, so its
        tokens
            do not depend on which other sequences happen to run beside it.

    Returns:
        tokens [B] int64, log-probs [B] float32 after temperature and truncation
        (``processed_logprobs``).
    """
    if sampling.temperature == 0.0:
        tokens = logits_BV.argmax(-1)
        return tokens, _logprob(logits_BV, tokens)
    logits_BV.div_(sampling.temperature)
    if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0:
        _truncate(logits_BV, sampling)
    normalizer = logits_BV.logsumexp(-1, keepdim=True)
    cumulative = (logits_BV - normalizer).exp_().cumsum(-1)
    if cumulative.is_cuda:
        # A parallel sum in float32 may dip by a rounding error, which binary search must not meet.
        cumulative = cumulative.cummax(-1).values
    # Scaling by the last entry absorbs rounding in the sum: a draw can never run off the end.
    target = uniform_B[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    tokens.clamp_(max=logits_BV.shape[-1] - 1)
    return tokens, (logits_BV.gather(-1, tokens[:, None]) - normalizer).squeeze(-1)


def _logprob(logits_BV: Tensor, tokens: Tensor) -> Tensor:
    return logits_BV.gather(-1, tokens[:, None]).squeeze(-1) - logits_BV.logsumexp(-1)


def _truncate(logits_BV: Tensor, sampling: SamplingParams) -> None:
    """Set what top-k, min-p and top-p leave out to -inf, in vLLM's order, in place."""
    if sampling.top_k:
        k = min(sampling.top_k, logits_BV.shape[-1])
        lowest = logits_BV.topk(k, dim=-1).values[:, -1:]
        logits_BV.masked_fill_(logits_BV < lowest, -torch.inf)
    if sampling.min_p > 0.0:
        floor = logits_BV.amax(-1, keepdim=True) + torch.log(torch.tensor(sampling.min_p))
        logits_BV.masked_fill_(logits_BV < floor, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits_BV.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # The token that crosses top_p stays in, so at least one always does.
        outside = before >= sampling.top_p
        logits_BV.masked_fill_(outside.scatter(-1, order, outside), -torch.inf)
