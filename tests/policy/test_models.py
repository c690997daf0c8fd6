"""Model families: packed log-probs and the engine's greedy tokens against transformers' own."""

from __future__ import annotations

import pytest
import torch

from helpers.families import FAMILIES, family_policy
from helpers.policies import make_groups, one_by_one
from rlsloth.data.packing import pack
from rlsloth.policy.attention import layout as packed_layout
from rlsloth.policy.attention import plain
from rlsloth.policy.wrap.wrap import unwrapped
from rlsloth.records import SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one(family):
    policy = family_policy(family)
    groups = make_groups(1)
    batch = pack(groups, 64, mask_truncated=False, keep_zero_advantage=True)
    cap = getattr(policy.config, "final_logit_softcapping", None)
    assert (cap is not None) == (family == "gemma2")
    for micro in batch.microbatches:
        out = policy.logprobs(micro).logprobs
        for r, (g, i) in enumerate(micro.source):
            want = one_by_one(policy, groups[g], groups[g].rollouts[i], 1.0)
            assert (out[micro.rollout_of == r] - want).abs().max() <= 1e-5
        out.sum().backward()
    grads = [p.grad for n, p in policy.weights().tensors.items() if "lora_B" in n]
    assert all(g is not None and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_equals_generate(family):
    policy = family_policy(family)
    prompts = [[5, 6, 7], [8] * 11, [9, 10]]
    engine = TransformersEngine(
        policy.model, policy.tokenizer, stop_ids=[1], context=128, max_sequences=4,
        device=policy.device, transform=policy.logit_transform,
    )  # fmt: skip
    got = engine.generate(prompts, 1, SamplingParams(max_tokens=12, temperature=0.0))
    base = policy.model.get_base_model()
    base.set_attn_implementation("eager")
    for prompt, (completion,) in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        with unwrapped(policy.model):
            out = policy.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                do_sample=False,
            )  # fmt: skip
        want = out[0, len(prompt) :].tolist()
        assert completion.token_ids == want[: len(completion.token_ids)]
        assert len(completion.token_ids) == len(want)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama"])
def test_long_sequences_are_exact_too(family, monkeypatch):
    """Trees over the limit are computed sequence by sequence, special attention in blocks."""
    monkeypatch.setattr(packed_layout, "TREE_LIMIT", 20)
    monkeypatch.setattr(plain, "BLOCK_ROWS", 3)
    policy = family_policy(family)
    groups = make_groups(1)
    batch = pack(groups, 10_000, mask_truncated=False, keep_zero_advantage=True)
    (micro,) = batch.microbatches
    out = policy.logprobs(micro).logprobs
    out.sum().backward()
    blocked = {n: p.grad.clone() for n, p in policy.weights().tensors.items()}
    for r, (g, i) in enumerate(micro.source):
        want = one_by_one(policy, groups[g], groups[g].rollouts[i], 1.0)
        assert (out[micro.rollout_of == r] - want).abs().max() <= 1e-5
    monkeypatch.undo()
    policy.optimizer.zero_grad()
    policy.logprobs(micro).logprobs.sum().backward()
    for n, p in policy.weights().tensors.items():
        torch.testing.assert_close(blocked[n], p.grad, rtol=1e-4, atol=1e-5)
