"""A wrapped model on a GPU: training against transformers' own modules, decoding under graphs."""

from __future__ import annotations

import pytest
import torch

from helpers.attention_gpu import VOCAB, logprobs_and_gradient
from helpers.tiny import tiny_tokenizer
from helpers.wrapping_gpu import decoder
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.kernels import device
from rlsloth.policy import support
from rlsloth.policy.attention import backends
from rlsloth.policy.policy import Policy
from rlsloth.policy.wrap.wrap import unwrapped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def policy_of(folder: str, precision: str, checkpointing: bool = False) -> Policy:
    policy = Policy.load(
        ModelConfig(path=folder, precision=precision, gradient_checkpointing=checkpointing),
        LoraConfig(rank=8), OptimConfig(name="adamw"), temperature=1.0, total_updates=10,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in policy.weights().tensors.items():
            p.normal_(0, 0.02 if "lora_B" in name else 0.1)
    return policy


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "nf4"])
def test_training_is_that_of_transformers(folder, precision, checkpointing):
    assert_trained_as_by_transformers(policy_of(folder, precision, checkpointing))


@pytest.mark.parametrize("precision", ["auto", "nf4"])
def test_training_without_bf16_is_that_of_transformers(folder, precision, monkeypatch):
    """The way of a GPU before Ampere: float16, torch's attention, matrix products by cuBLAS."""
    monkeypatch.setattr(support, "has_bf16", lambda _: False)
    monkeypatch.setattr(device, "_capability", lambda _: 7)
    monkeypatch.setattr(backends, "available_backends", lambda: ["sdpa"])
    policy = policy_of(folder, precision)
    assert policy.dtype == torch.float16
    assert policy.backend == "sdpa"
    assert_trained_as_by_transformers(policy)


def assert_trained_as_by_transformers(policy: Policy) -> None:
    assert {"lora_mlp", "lora_qkv", "rope", "add_rms_norm"} <= set(policy.wrapped.kernels)
    got, grad = logprobs_and_gradient(policy)
    for p in policy.weights().tensors.values():
        p.grad = None
    with unwrapped(policy.model):
        want, want_grad = logprobs_and_gradient(policy)
    assert (got - want).abs().max() < 0.05
    assert (got - want).abs().mean() < 0.01
    assert torch.nn.functional.cosine_similarity(grad, want_grad, 0) > 0.999


@pytest.mark.parametrize("precision", ["bf16", "fp16", "nf4"])
@pytest.mark.parametrize("rows", [4, 40, 160])
def test_graphs_follow_the_adapter(folder, precision, rows):
    """Decode each number of rows as trained, without the adapter, and after an update."""
    policy = policy_of(folder, precision)
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
