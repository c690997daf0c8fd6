"""Model families: packed log-probs and the engine's greedy tokens against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_policy import VOCAB, make_groups, one_by_one
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.attention import layout as packed_layout
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy
from rlsloth.policy.wrap.wrap import unwrapped
from rlsloth.records import SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine

COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 1,
    "bos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 128,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.25},
    "qwen3_moe": {
        **MOE,
        "moe_intermediate_size": 16,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "gpt_oss": {**MOE, "sliding_window": 6},
}


def family_model(family: str, **settings: Any) -> Any:
    """Random float32 model of transformers' own class, frozen, in eval mode."""
    torch.manual_seed(0)
    attention.register()
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # random sinks and biases take part, too
            if p.dim() == 1 and "norm" not in name:
                p.normal_()
    model.requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    return model


def family_policy(family: str, **model: Any) -> Policy:
    loaded = LoadedModel(family_model(family), tiny_tokenizer(), torch.device("cpu"), torch.float32)
    return Policy(
        loaded, ModelConfig(gradient_checkpointing=False, **model), LoraConfig(rank=4),
        OptimConfig(), temperature=1.0, total_updates=1,
    )  # fmt: skip


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
    grads = [p.grad for n, p in policy.adapter().tensors.items() if "lora_B" in n]
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
    """Trees over the limit go sequence by sequence, special attention in recomputed blocks."""
    monkeypatch.setattr(packed_layout, "TREE_LIMIT", 20)
    monkeypatch.setattr(attention, "BLOCK_ROWS", 3)
    policy = family_policy(family)
    groups = make_groups(1)
    batch = pack(groups, 10_000, mask_truncated=False, keep_zero_advantage=True)
    (micro,) = batch.microbatches
    out = policy.logprobs(micro).logprobs
    out.sum().backward()
    blocked = {n: p.grad.clone() for n, p in policy.adapter().tensors.items()}
    for r, (g, i) in enumerate(micro.source):
        want = one_by_one(policy, groups[g], groups[g].rollouts[i], 1.0)
        assert (out[micro.rollout_of == r] - want).abs().max() <= 1e-5
    monkeypatch.undo()
    policy.optimizer.zero_grad()
    policy.logprobs(micro).logprobs.sum().backward()
    for n, p in policy.adapter().tensors.items():
        torch.testing.assert_close(blocked[n], p.grad, rtol=1e-4, atol=1e-5)
