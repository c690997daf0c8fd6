"""SimPO (Meng et al. 2024, arXiv:2405.14734), with the likelihood term of CPO (arXiv:2401.08417).

TRL has it as its CPO trainer with ``loss_type="simpo"``.
"""

from __future__ import annotations

from rlsloth.losses.preference.base import (
    Normalizer,
    PairLogps,
    PreferenceOutput,
    logistic_loss,
    output,
    pair_sums,
)
from rlsloth.losses.preference.methods import SimpoLossConfig


def simpo_loss(logps: PairLogps, cfg: SimpoLossConfig, normalizer: Normalizer) -> PreferenceOutput:
    """Eq. 6: mean over the step's pairs of -logsigmoid(beta (chosen - rejected) - gamma) on mean
    log-probs, plus nll_weight times the chosen completions' mean -log p per token; a micro-batch's
    share."""
    chosen_P, rejected_P = cfg.beta * logps.chosen_mean, cfg.beta * logps.rejected_mean
    loss_P = logistic_loss(chosen_P - rejected_P - cfg.gamma, cfg.label_smoothing)
    total = loss_P.sum() / normalizer.examples
    sums = pair_sums(chosen_P, rejected_P, logps.chosen_mean, logps.rejected_mean)
    if cfg.nll_weight:
        nll = -logps.chosen.sum()
        total = total + cfg.nll_weight * nll / normalizer.nll_tokens
        sums["nll_loss"] = (nll, logps.chosen_tokens.sum())
    return output(total, sums)
