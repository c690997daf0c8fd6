"""Drawing tokens from logits, against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers.sampling import chi_square_excess, reference_distribution
from rlsloth.records import SamplingParams
from rlsloth.rollout.embedded.sampling import draw

SETTINGS = [
    SamplingParams(1),
    SamplingParams(1, temperature=0.3),
    SamplingParams(1, temperature=2.5),
    SamplingParams(1, top_k=1),
    SamplingParams(1, top_k=4),
    SamplingParams(1, top_k=1000),
    SamplingParams(1, top_p=0.5),
    SamplingParams(1, top_p=1e-6),
    SamplingParams(1, min_p=0.2),
    SamplingParams(1, min_p=1.0),
    SamplingParams(1, temperature=1.4, top_k=8, top_p=0.8, min_p=0.05),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
def test_draw_equals_the_reference(sampling):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (300, 23)).astype(np.float32)
    uniform = rng.random(300).astype(np.float32)
    got, logprobs = draw(torch.tensor(logits), torch.tensor(uniform), sampling)
    for row, u, token, logprob in zip(
        logits, uniform, got.tolist(), logprobs.tolist(), strict=True
    ):
        p = reference_distribution(row, sampling)
        assert token == np.searchsorted(np.cumsum(p), u, side="right")
        assert logprob == pytest.approx(math.log(p[token]), abs=2e-6)


def test_draw_frequencies():
    draws = 50_000
    logits = np.random.default_rng(1).normal(0, 1.5, 11).astype(np.float32)
    for sampling in SETTINGS:
        generator = torch.Generator().manual_seed(8)
        rows = torch.tensor(logits).repeat(draws, 1)
        got, _ = draw(rows, torch.rand(draws, generator=generator), sampling)
        counts = np.bincount(got.numpy(), minlength=11)
        assert chi_square_excess(counts, reference_distribution(logits, sampling)) < 5, sampling


def test_temperature_0_takes_the_best_and_reports_the_untempered_logprob():
    logits = torch.randn(50, 23, generator=torch.Generator().manual_seed(0))
    want = logits.log_softmax(-1).max(-1)
    got, logprobs = draw(
        logits.clone(), torch.full((50,), 0.999), SamplingParams(1, temperature=0.0)
    )
    assert torch.equal(got, want.indices)
    assert torch.allclose(logprobs, want.values, atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("vocab", [3, 1021, 50257])
def test_the_ends_of_the_unit_interval_never_pick_what_was_cut(uniform, vocab):
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[:, 0] = logits[:, -1] = -50.0
    got, logprobs = draw(logits, torch.full((8,), uniform), SamplingParams(1, top_k=vocab // 2))
    assert logprobs.isfinite().all()
    assert ((got > 0) & (got < vocab - 1)).all()
