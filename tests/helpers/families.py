"""Tiny random models of every known family."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.policies import VOCAB
from helpers.tiny import tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy

COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 1,
    "bos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 128,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
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
    """Make a random float32 model of transformers' own class, frozen, in eval mode."""
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
