"""Experts on a GPU: training against the loop over experts, decoding under graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_attention_gpu import VOCAB, logprobs_and_gradient
from test_wrap_gpu import decoder
from tiny import tiny_tokenizer

from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.policy.policy import Policy

pytestmark = pytest.mark.gpu

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CASES = [("qwen3_moe", ATTENTION), ("qwen3_moe", EXPERTS), ("gpt_oss", ATTENTION)]


def policy_of(folder: Path, family: str, targets: list[str], **changes: int) -> Policy:
    """Of one layer: rounding before a second would give some tokens other experts there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 1, "head_dim": 64,
        "intermediate_size": 128, "moe_intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts": 32, "num_local_experts": 32, "num_experts_per_tok": 4,
        "max_position_embeddings": 4096, "initializer_range": 0.05,
        "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **shape | changes)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    policy = Policy.load(
        ModelConfig(path=str(folder), precision="bf16"), LoraConfig(rank=8, targets=targets),
        OptimConfig(name="adamw"), temperature=1.0, total_updates=10,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in policy.adapter().tensors.items():
            p.normal_(0, 0.02 if "lora_B" in name else 0.1)
    return policy


@pytest.mark.parametrize(("family", "targets"), CASES)
def test_training_is_that_of_the_loop(family, targets, tmp_path):
    policy = policy_of(tmp_path, family, targets)
    base = policy.model.get_base_model()
    assert base.config._experts_implementation == "grouped_mm"
    got, grad = logprobs_and_gradient(policy)
    for p in policy.adapter().tensors.values():
        p.grad = None
    base.set_experts_implementation("eager")
    want, want_grad = logprobs_and_gradient(policy)
    assert (got - want).abs().max() < 0.05
    assert (got - want).abs().mean() < 0.01
    assert torch.nn.functional.cosine_similarity(grad, want_grad, 0) > 0.999


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize(("family", "targets"), CASES)
def test_graphs_follow_the_adapter(family, targets, rows, tmp_path):
    """As trained, without the adapter, and after an update."""
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
