"""vLLM on the very weights that a model trains, in bf16 with graphs on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.policies import make_groups
from helpers.tiny import tiny_tokenizer
from helpers.vllm_engines import gap, make, tokens
from helpers.vllm_gpu import used
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack, to_device
from rlsloth.policy.policy import Policy
from rlsloth.records import SamplingParams

pytest.importorskip("vllm")
CACHE = 2**30
PREFIXES = [[5, 6, 7], [8] * 11, list(range(9, 60))]
SAMPLING = SamplingParams(24, temperature=1.0, seed=1)


def load(folder: Path) -> Policy:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=4096,
        initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model = ModelConfig(path=str(folder), precision="bf16", trained=["all"])
    return Policy.load(
        model, LoraConfig(), OptimConfig(name="adamw_8bit", lr=1e-3), temperature=1.0,
        total_updates=10,
    )  # fmt: skip


def update(policy: Policy) -> None:
    batch = pack(make_groups(1), 10_000, mask_truncated=False, keep_zero_advantage=True)
    micro = to_device(batch.microbatches[0], policy.device)
    for _ in range(3):
        policy.backward(-policy.logprobs(micro).logprobs.mean())
        policy.step()


def test_it_samples_what_was_learnt(tmp_path: Path) -> None:
    policy = load(tmp_path)
    weights = sum(p.numel() * p.element_size() for p in policy.trained.values())
    before_engine = used()
    engine = make(policy, kv_bytes=CACHE)
    try:
        engine.set_weights(policy.weights())
        before = engine.generate(PREFIXES, 4, SAMPLING)
        assert used() - before_engine < CACHE + weights  # no second copy beside cache and graphs
        at_first = gap(policy, PREFIXES, before).mean()
        update(policy)
        moved = gap(policy, PREFIXES, before).mean()
        engine.set_weights(policy.weights())
        after = engine.generate(PREFIXES, 4, SAMPLING)
        apart = gap(policy, PREFIXES, after).mean()
        print(f"{at_first:.2g} before, {moved:.2g} from the old weights, {apart:.2g} after")
        assert at_first < 0.05
        assert apart < 0.05
        assert moved > 5 * apart
        with engine.base_model():
            assert tokens(engine.generate(PREFIXES, 4, SAMPLING)) == tokens(before)
        assert tokens(engine.generate(PREFIXES, 4, SAMPLING)) == tokens(after)
    finally:
        engine.close()
