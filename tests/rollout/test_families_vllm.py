"""Tiny models of several families in vLLM against the trainer, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.families import COMMON, FAMILIES, MOE, family_policy
from helpers.vllm_engines import gap
from rlsloth.errors import UserError
from rlsloth.policy.plain_logprobs import plain_logprobs
from rlsloth.policy.policy import Policy
from rlsloth.records import SamplingParams
from rlsloth.rollout.vllm.engine import VllmEngine

pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}  # heads that vLLM takes
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 32},
    "granite": FAMILIES["granite"],
    "cohere": FAMILIES["cohere"],
    "qwen3_moe": {**MOE, "moe_intermediate_size": 16},
    "gpt_oss": FAMILIES["gpt_oss"],
    "olmo2": {},
}
PREFIXES = [[5, 6, 7], [8] * 11, list(range(9, 60))]


@pytest.fixture
def policy_of(monkeypatch: pytest.MonkeyPatch):
    def make(family: str) -> Policy:
        for name, value in WIDE.items():
            monkeypatch.setitem(COMMON, name, value)
        monkeypatch.setitem(FAMILIES, family, VARIANTS[family])
        policy = family_policy(family)
        with torch.no_grad():
            for name, p in policy.weights().tensors.items():
                if "lora_B" in name:
                    p.normal_(0, 0.1)
        return policy

    return make


def start(policy: Policy) -> VllmEngine:
    return VllmEngine(
        policy.model,
        policy.tokenizer,
        stop_ids=[1],
        context=128,
        max_sequences=8,
        dtype=policy.dtype,
        device=policy.device,
        kv_cache="auto",
        kv_bytes=64 * 2**20,
    )


@pytest.mark.parametrize("family", [name for name in VARIANTS if name != "olmo2"])
def test_samples_what_the_trainer_computes(family, policy_of):
    policy = policy_of(family)
    engine = start(policy)
    try:
        engine.set_weights(policy.weights())
        sampling = SamplingParams(20, seed=1)
        adapted = gap(policy, PREFIXES, engine.generate(PREFIXES, 2, sampling)).mean()
        with engine.base_model():
            groups = engine.generate(PREFIXES, 2, sampling)
        with policy.base_model():
            plain = gap(policy, PREFIXES, groups).mean()
    finally:
        engine.close()
    print(f"{family}: {adapted:.2g} with the adapter, {plain:.2g} without")
    assert adapted < 1e-5
    assert plain < 1e-5


def test_a_family_that_vllm_leaves_to_transformers_is_refused_and_still_trains(policy_of):
    policy = policy_of("olmo2")
    with pytest.raises(UserError, match="no implementation of its own for Olmo2ForCausalLM"):
        start(policy)
    assert plain_logprobs(policy, [5, 6], [7]).isfinite().all()
