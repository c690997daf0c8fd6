"""Preference losses on sums of log-probs, per pair (DPO, ORPO, SimPO) or per completion (KTO).

A step's loss is the sum of its micro-batches' totals, however the step is cut into them.

Shape letters: P pairs of a micro-batch, B its unpaired completions.
"""

from rlsloth.losses.preference.base import (
    Normalizer,
    PairLogps,
    PreferenceOutput,
    PreferenceStats,
    metrics,
    normalizer,
    pair_logps,
    score_prompts,
)
from rlsloth.losses.preference.dpo import DPO_LOSSES, dpo_loss
from rlsloth.losses.preference.kto import kl_baseline, kto_loss
from rlsloth.losses.preference.orpo import orpo_loss
from rlsloth.losses.preference.simpo import simpo_loss

__all__ = [
    "DPO_LOSSES",
    "Normalizer",
    "PairLogps",
    "PreferenceOutput",
    "PreferenceStats",
    "dpo_loss",
    "kl_baseline",
    "kto_loss",
    "metrics",
    "normalizer",
    "orpo_loss",
    "pair_logps",
    "score_prompts",
    "simpo_loss",
]
