"""Log-probs and gradients of a policy on a GPU."""

from __future__ import annotations

import torch

from helpers.policies import make_groups
from helpers.tiny import tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import pack, to_device
from rlsloth.policy.attention import interface as attention
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy

VOCAB = 97


def logprobs_and_gradient(policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    batch = pack(make_groups(2), 400, mask_truncated=False, keep_zero_advantage=True)
    outs = []
    for micro in batch.microbatches:
        micro = to_device(micro, policy.device)
        out = policy.logprobs(micro).logprobs
        (out * micro.advantages).sum().backward()
        outs.append(out.detach())
    grads = [p.grad.flatten().float() for p in policy.weights().tensors.values()]
    return torch.cat(outs), torch.cat(grads)


def gpu_policy(backend: str, dtype: torch.dtype) -> Policy:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    attention.register()
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", dtype)
    model.requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    loaded = LoadedModel(model, tiny_tokenizer(), torch.device("cuda"), dtype)
    policy = Policy(
        loaded,
        ModelConfig(attention=backend, gradient_checkpointing=False),
        LoraConfig(rank=8),
        OptimConfig(name="adamw"),
        temperature=1.0,
        total_updates=1,
    )
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for name, p in policy.weights().tensors.items():
            shape_noise = torch.randn(p.shape, generator=generator, device="cuda")
            p.copy_(shape_noise * (0.02 if "lora_B" in name else 0.1))
    return policy
