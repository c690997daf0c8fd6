"""vLLM on the very weights that a model trains, in float32 on a CPU."""

from __future__ import annotations

import pytest
import torch

from helpers.families import COMMON, FAMILIES, family_model
from helpers.policies import make_groups
from helpers.tiny import tiny_tokenizer
from helpers.vllm_engines import gap, tokens
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack
from rlsloth.errors import UserError
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy
from rlsloth.records import SamplingParams
from rlsloth.rollout.vllm.engine import VllmEngine

pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}  # heads that vLLM takes
PREFIXES = [[5, 6, 7], [8] * 11, list(range(9, 60))]
SAMPLING = SamplingParams(12, temperature=1.0, seed=1)


def policy_of(family: str, monkeypatch: pytest.MonkeyPatch) -> Policy:
    for name, value in WIDE.items():
        monkeypatch.setitem(COMMON, name, value)
    if family != "qwen3_moe":  # vLLM refuses their windows
        monkeypatch.setitem(FAMILIES, family, {})
    loaded = LoadedModel(family_model(family), tiny_tokenizer(), torch.device("cpu"), torch.float32)
    return Policy(
        loaded, ModelConfig(trained=["all"], gradient_checkpointing=False), LoraConfig(),
        OptimConfig(lr=3e-3), temperature=1.0, total_updates=4,
    )  # fmt: skip


def start(policy: Policy) -> VllmEngine:
    return VllmEngine(
        policy.model, policy.tokenizer, stop_ids=[1], context=128, max_sequences=8,
        dtype=policy.dtype, device=policy.device, kv_cache="auto", kv_bytes=64 * 2**20,
    )  # fmt: skip


def update(policy: Policy) -> None:
    batch = pack(make_groups(1), 10_000, mask_truncated=False, keep_zero_advantage=True)
    for _ in range(2):
        policy.backward(-policy.logprobs(batch.microbatches[0]).logprobs.mean())
        policy.step()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])  # qwen2 has biases of q, k and v
def test_it_samples_what_was_learnt(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(family, monkeypatch)
    engine = start(policy)
    try:
        engine.set_weights(policy.weights())
        before = engine.generate(PREFIXES, 2, SAMPLING)
        assert gap(policy, PREFIXES, before).max() < 1e-3
        update(policy)
        assert gap(policy, PREFIXES, before).max() > 1e-2
        engine.set_weights(policy.weights())
        after = engine.generate(PREFIXES, 2, SAMPLING)
        assert engine.version == policy.version == 2
        assert gap(policy, PREFIXES, after).max() < 1e-3
        with engine.base_model():
            assert tokens(engine.generate(PREFIXES, 2, SAMPLING)) == tokens(before)
        assert tokens(engine.generate(PREFIXES, 2, SAMPLING)) == tokens(after)
        assert gap(policy, PREFIXES, after).max() < 1e-3
    finally:
        engine.close()


def test_experts_that_learn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("qwen3_moe", monkeypatch)
    with pytest.raises(UserError, match=r"--model\.trained: vLLM has experts in an order"):
        start(policy)
