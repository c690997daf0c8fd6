"""The distribution that sampling must follow, in float64, and how far frequencies are from it."""

from __future__ import annotations

import math

import numpy as np

from rlsloth.records import SamplingParams


def reference_distribution(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, then top-k, min-p and top-p, in float64 and by the book."""
    scaled = logits.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = np.ones(len(p), dtype=bool)
    if sampling.top_k:
        keep[order[sampling.top_k :]] = False
    keep &= p >= sampling.min_p * p.max()
    p = np.where(keep, p, 0) / p[keep].sum()
    if sampling.top_p < 1:
        mass_before = np.cumsum(p[order]) - p[order]
        p[order[mass_before >= sampling.top_p]] = 0
        p /= p.sum()
    return p


def chi_square_excess(counts: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations of Pearson's statistic above its mean; inf for impossible draws."""
    if counts[expected == 0].any():
        return math.inf
    mean = expected * counts.sum()
    common = mean >= 5  # the rest is pooled, by the usual rule
    o = np.append(counts[common], counts[~common].sum())
    e = np.append(mean[common], mean[~common].sum())
    o, e = o[e > 0], e[e > 0]
    freedom = max(len(e) - 1, 1)
    return float((((o - e) ** 2 / e).sum() - freedom) / math.sqrt(2 * freedom))
