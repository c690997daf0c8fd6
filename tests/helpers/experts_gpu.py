"""Policies with experts, on a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.attention_gpu import VOCAB
from helpers.tiny import tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.policy.policy import Policy

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def policy_of(folder: Path, family: str, targets: list[str], **changes: int) -> Policy:
    """Make a policy of one layer: rounding could choose different experts in a second one."""
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
        for name, p in policy.weights().tensors.items():
            p.normal_(0, 0.02 if "lora_B" in name else 0.1)
    return policy
