"""Log-probs of the vLLM engine in bf16 against the trainer's."""

from __future__ import annotations

import pytest
import torch
from test_smollm2 import load
from test_vllm import QUESTIONS, chat, make

from rlsloth.packing import pack
from rlsloth.records import Group, Prompt, Rollout, SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LIMIT = 0.05
"""Nats a token. bf16 moves this model's log-probs by 0.03 (vLLM) and 0.04 (transformers' modules)
from float32, each in its own way; the embedded engine lies 0.037 from transformers' modules."""


def test_sampled_logprobs_are_near_the_trainers():
    policy = load("bf16")
    prefixes = [chat(policy, question) for question in QUESTIONS]
    engine = make(policy)
    try:
        engine.load(policy.adapter())
        sampled = engine.generate(prefixes, 3, SamplingParams(max_tokens=12, seed=1))
    finally:
        engine.close()
    groups = [Group(Prompt(i, "", {}), prefix, []) for i, prefix in enumerate(prefixes)]
    for group, completions in zip(groups, sampled, strict=True):
        for c in completions:
            n = len(c.token_ids)
            group.rollouts.append(
                Rollout(c.token_ids, [True] * n, c.logprobs, [0] * n, c.finish, "", [])
            )
    batch = pack(groups, 10_000, mask_truncated=False, keep_zero_advantage=True)
    (micro,) = batch.microbatches
    gap = (policy.eval_logprobs(micro) - micro.rollout_logprobs).abs()
    print(f"bf16: mean |difference| {gap.mean():.3f}, max {gap.max():.2f} of {len(gap)} tokens")
    assert torch.isfinite(gap).all()
    assert gap.mean() <= LIMIT
