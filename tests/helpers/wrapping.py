"""Random models, and comparisons of wrapped with plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.families import FAMILIES, family_model
from helpers.policies import VOCAB
from rlsloth.config import LoraConfig, ModelConfig
from rlsloth.policy.lora import add_adapter
from rlsloth.policy.policy import Policy
from rlsloth.policy.wrap.wrap import wrap
from rlsloth.records import SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine

SPREAD = {"initializer_range": 0.15}
"""Weights so large that outputs are of order 1 and errors show."""

UNKNOWN = ("granite", "cohere")
"""Families without a class in wrap/families.py."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama3_rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "phi4_partial_rope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5
            }
        },
    ),
    "mistral_whole": ("mistral", {"sliding_window": None}),
    "qwen3_moe_dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
}  # fmt: skip
"""Name -> family and settings: every family, and some with other rotary positions or layers."""


def randomize(model: Any) -> None:
    """Fill norms, so that their offset counts, and adapters with random numbers."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p), alpha=0.2)
            if "lora_B" in name:
                p.normal_(0, 0.1)


def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute logits of two random sequences, and the gradients of a sum of them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 11), generator=generator)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    model.zero_grad()
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


def assert_same(model: Any, stock: Any) -> None:
    """Compare in fp32: outputs within 1e-5, gradients within 1e-4 of their largest element."""
    (got, grads), (want, stock_grads) = run(model), run(stock)
    assert want.std() > 0.1
    assert (got - want).abs().max() <= 1e-5
    assert grads.keys() == stock_grads.keys()
    for name, g in stock_grads.items():
        assert (grads[name] - g).abs().max() <= 1e-4 * g.abs().max(), name


def decoded(policy: Policy) -> list[list[int]]:
    engine = TransformersEngine(
        policy.model, policy.tokenizer, stop_ids=[1], context=128, max_sequences=4,
        device=policy.device, transform=policy.logit_transform,
    )  # fmt: skip
    prompts = [[5, 6, 7], [8] * 11, [9, 10]]
    out = engine.generate(prompts, 2, SamplingParams(max_tokens=12, temperature=1.0, seed=3))
    return [c.token_ids for completions in out for c in completions]


def adapted(family: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A random model of a variant with a random adapter, not wrapped."""
    name, settings = VARIANTS[family]
    model = family_model(name, **SPREAD, **settings).to(dtype)
    model.set_attn_implementation("eager")
    model = add_adapter(model, LoraConfig(rank=4, **lora), ModelConfig())
    randomize(model)
    return model


def reasons(model: Any) -> dict[str, str]:
    """Wrap a model; class that is not wrapped -> the reason."""
    return {left.name: left.reason for left in wrap(model).left}
