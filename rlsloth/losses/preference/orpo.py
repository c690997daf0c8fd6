"""ORPO (Hong et al. 2024, arXiv:2403.07691): likelihood of the chosen answer and an odds ratio."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlsloth.losses.preference.base import (
    Normalizer,
    PairLogps,
    PreferenceOutput,
    output,
    pair_sums,
)
from rlsloth.losses.preference.methods import OrpoLossConfig

CERTAIN = -1e-6
"""Mean log-probs are capped here in the odds: at 0 they would be infinite and their gradient
NaN."""


def log_odds(mean_P: Tensor) -> Tensor:
    """[P] log(p / (1 - p)) with p = exp(mean_P)."""
    mean_P = mean_P.clamp(max=CERTAIN)
    return mean_P - torch.log(-torch.expm1(mean_P))


def orpo_loss(logps: PairLogps, cfg: OrpoLossConfig, normalizer: Normalizer) -> PreferenceOutput:
    """Eq. 6: mean negative log-likelihood less beta times the mean log-sigmoid of the log odds
    ratio; a micro-batch's share.

    Odds are those of the mean log-prob per token. The likelihood is a mean over the step's tokens:
    of the chosen completions, and with ``cfg.nll_prompt`` of the prompts before them.
    """
    chosen_P, rejected_P = logps.chosen_mean, logps.rejected_mean
    log_odds_P = log_odds(chosen_P) - log_odds(rejected_P)
    ratio_P = logsigmoid(log_odds_P)
    nll, tokens = -logps.chosen.sum(), logps.chosen_tokens.sum()
    if cfg.nll_prompt:
        assert logps.prompt is not None, "the micro-batch comes from score_prompts"
        assert logps.prompt_tokens is not None
        nll = nll - logps.prompt.sum()
        tokens = tokens + logps.prompt_tokens.sum()
    total = nll / normalizer.nll_tokens - cfg.beta * ratio_P.sum() / normalizer.examples
    sums = pair_sums(cfg.beta * chosen_P, cfg.beta * rejected_P, chosen_P, rejected_P)
    sums["nll_loss"] = (nll, tokens)
    sums["log_odds_ratio"] = (ratio_P.sum(), len(ratio_P))
    sums["log_odds_chosen"] = (log_odds_P.sum(), len(log_odds_P))
    return output(total, sums)
