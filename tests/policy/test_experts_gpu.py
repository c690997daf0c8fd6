"""Experts on a GPU: training against the loop over experts, decoding under graphs."""

from __future__ import annotations

import pytest
import torch

from helpers.attention_gpu import logprobs_and_gradient
from helpers.experts_gpu import ATTENTION, policy_of
from helpers.wrapping_gpu import decoder

EXPERTS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CASES = [("qwen3_moe", ATTENTION), ("qwen3_moe", EXPERTS), ("gpt_oss", ATTENTION)]


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_training_is_that_of_the_loop(family, targets, tmp_path):
    policy = policy_of(tmp_path, family, targets)
    base = policy.model.get_base_model()
    assert base.config._experts_implementation == "grouped_mm"
    got, grad = logprobs_and_gradient(policy)
    for p in policy.weights().tensors.values():
        p.grad = None
    base.set_experts_implementation("eager")
    want, want_grad = logprobs_and_gradient(policy)
    assert (got - want).abs().max() < 0.05
    assert (got - want).abs().mean() < 0.01
    assert torch.nn.functional.cosine_similarity(grad, want_grad, 0) > 0.999


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize(("family", "targets"), CASES)
def test_graphs_follow_the_adapter(family, targets, rows, tmp_path):
    """Decode as trained, without the adapter, and after an update."""
    policy = policy_of(tmp_path, family, targets)
    decoders = [decoder(policy, graphs, rows) for graphs in (True, False)]
    first = [decode() for decode in decoders]
    with policy.base_model():
        base = [decode() for decode in decoders]
    logprobs_and_gradient(policy)
    policy.step()
    updated = [decode() for decode in decoders]
    for graphed, eager in (first, base, updated):
        assert graphed == pytest.approx(eager, abs=0.05)
    assert first[0] != base[0] != updated[0] != first[0]
