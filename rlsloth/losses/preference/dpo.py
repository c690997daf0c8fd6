"""DPO (Rafailov et al. 2023, arXiv:2305.18290) and its kin, which share the implicit reward.

A log-ratio is the completion's summed log-prob under the policy less that under the starting
policy; beta times it is the reward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlsloth.losses.preference.base import (
    Normalizer,
    PairLogps,
    PreferenceOutput,
    logistic_loss,
    output,
    pair_sums,
)
from rlsloth.losses.preference.methods import DpoLossConfig

PairLoss = Callable[[Tensor, Tensor, DpoLossConfig], Tensor]
"""(chosen log-ratio [P], rejected log-ratio [P], cfg) -> loss [P]."""


def _sigmoid(chosen_P: Tensor, rejected_P: Tensor, cfg: DpoLossConfig) -> Tensor:
    """Eq. 7; with label smoothing conservative DPO (Mitchell 2023)."""
    return logistic_loss(cfg.beta * (chosen_P - rejected_P), cfg.label_smoothing)


def _ipo(chosen_P: Tensor, rejected_P: Tensor, cfg: DpoLossConfig) -> Tensor:
    """Azar et al. 2023, arXiv:2310.12036, eq. 17, on means over tokens (which its authors used)."""
    return (chosen_P - rejected_P - 1 / (2 * cfg.beta)).square()


def _hinge(chosen_P: Tensor, rejected_P: Tensor, cfg: DpoLossConfig) -> Tensor:
    """SLiC (Zhao et al. 2023, arXiv:2305.10425) on rewards, as in RSO (arXiv:2309.06657)."""
    return torch.relu(1 - cfg.beta * (chosen_P - rejected_P))


def _robust(chosen_P: Tensor, rejected_P: Tensor, cfg: DpoLossConfig) -> Tensor:
    """Ray Chowdhury et al. 2024, arXiv:2403.00409: unbiased where that share is flipped."""
    logits_P = cfg.beta * (chosen_P - rejected_P)
    flipped = cfg.label_smoothing
    kept_P = -(1 - flipped) * logsigmoid(logits_P)
    return (kept_P + flipped * logsigmoid(-logits_P)) / (1 - 2 * flipped)


def _apo_zero(chosen_P: Tensor, rejected_P: Tensor, cfg: DpoLossConfig) -> Tensor:
    """D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7."""
    return torch.sigmoid(-cfg.beta * chosen_P) + torch.sigmoid(cfg.beta * rejected_P)


def _apo_down(chosen_P: Tensor, rejected_P: Tensor, cfg: DpoLossConfig) -> Tensor:
    """D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8."""
    return torch.sigmoid(cfg.beta * chosen_P) + torch.sigmoid(-cfg.beta * (chosen_P - rejected_P))


DPO_LOSSES: dict[str, PairLoss] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid,
    "ipo": _ipo,
    "hinge": _hinge,
    "robust": _robust,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}

ON_MEANS = ("ipo", "sigmoid_norm")
"""Losses whose log-ratios are means over a completion's tokens, not sums."""


def dpo_loss(logps: PairLogps, cfg: DpoLossConfig, normalizer: Normalizer) -> PreferenceOutput:
    """The mean over the step's pairs of the chosen loss, plus the SFT term; a micro-batch's share.

    The SFT term is sft_weight times the mean of -log p over the tokens of the step's chosen
    completions. Rewards among the metrics are of sums, whichever loss is used.
    """
    assert logps.reference_chosen is not None
    assert logps.reference_rejected is not None
    chosen_P = logps.chosen - logps.reference_chosen
    rejected_P = logps.rejected - logps.reference_rejected
    sums = pair_sums(cfg.beta * chosen_P, cfg.beta * rejected_P, logps.chosen, logps.rejected)
    if cfg.name in ON_MEANS:
        chosen_P = chosen_P / logps.chosen_tokens
        rejected_P = rejected_P / logps.rejected_tokens
    total = DPO_LOSSES[cfg.name](chosen_P, rejected_P, cfg).sum() / normalizer.examples
    if cfg.sft_weight:
        nll = -logps.chosen.sum()
        total = total + cfg.sft_weight * nll / normalizer.nll_tokens
        sums["nll_loss"] = (nll, logps.chosen_tokens.sum())
    return output(total, sums)
