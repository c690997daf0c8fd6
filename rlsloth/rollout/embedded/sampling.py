"""Drawing one token per row of logits, reproducibly and whatever the other rows are."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.records import SamplingParams


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse-CDF sampling.

    Args:
        logits_BV: float32, overwritten.
        uniform_B: a random number in [0, 1) for each row. Each sequence has its own stream of
            numbers, so its tokens do not depend on the other sequences in the batch.
        sampling: temperature, top-k, top-p and min-p.

    Returns:
        tokens [B] int64, and their log-probs [B] float32 in the distribution drawn from: after
        temperature and truncation (vLLM's ``processed_logprobs``). At temperature 0 the log-probs
        are those of temperature 1.
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
        # A parallel sum in float32 may decrease by a rounding error; binary search needs it sorted.
        cumulative = cumulative.cummax(-1).values
    # Scaling by the last entry absorbs rounding in the sum: no draw is past the end.
    target = uniform_B[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    tokens.clamp_(max=logits_BV.shape[-1] - 1)
    return tokens, (logits_BV.gather(-1, tokens[:, None]) - normalizer).squeeze(-1)


def _logprob(logits_BV: Tensor, tokens: Tensor) -> Tensor:
    return logits_BV.gather(-1, tokens[:, None]).squeeze(-1) - logits_BV.logsumexp(-1)


def _truncate(logits_BV: Tensor, sampling: SamplingParams) -> None:
    """Set logits outside top-k, min-p and top-p (in vLLM's order) to -inf, in place."""
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
        # The token that crosses top_p is kept, so at least one always is.
        outside = before >= sampling.top_p
        logits_BV.masked_fill_(outside.scatter(-1, order, outside), -torch.inf)
