"""Layers streamed to a GPU: copies do not race with the work, and the memory is given back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.allocations import stream
from helpers.gpu_memory import requested
from helpers.tiny import tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.data.packing import to_device
from rlsloth.kernels.nf4 import ahead
from rlsloth.policy.activations.placement import Placement, Placements
from rlsloth.policy.policy import Policy
from rlsloth.policy.streamed_layers import STREAMED, streamed_layers
from rlsloth.records import SamplingParams
from rlsloth.rollout.embedded.engine import TransformersEngine

LAYERS, STREAM = 8, 6
STEPS = 6
MIXED: Placements = (
    Placement("host"), Placement(), None, Placement("host"), None, Placement(), None, Placement()
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=LAYERS,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def clear() -> None:
    ahead._POOL.clear()
    gc.collect()
    torch.cuda.empty_cache()


def load(folder: Path, precision: str, layers: int, placements: Placements | None) -> Policy:
    torch.manual_seed(0)
    model: Any = ModelConfig.model_validate({
        "path": str(folder), "precision": precision, "device": "cuda", "offload_layers": layers,
        "gradient_checkpointing": True,
    })  # fmt: skip
    return Policy.load(
        model, LoraConfig(), OptimConfig(lr=1e-3), temperature=1.0, total_updates=STEPS,
        placements=placements,
    )  # fmt: skip


def first_step(policy: Policy) -> list[torch.Tensor]:
    """Return log-probs and gradients of one micro-batch."""
    micro = to_device(stream(2, 100, 100, 4), policy.device)
    scored = policy.logprobs(micro).logprobs
    scored.sum().backward()
    weights = policy.weights().tensors.values()
    return [scored.detach(), *(p.grad.clone() for p in weights if p.grad is not None)]


def steps(policy: Policy) -> list[torch.Tensor]:
    """Train several steps in a row without waiting for the GPU; return log-probs of each."""
    micro = to_device(stream(2, 100, 100, 4), policy.device)
    found = []
    for _ in range(STEPS):
        for _ in range(2):
            scored = policy.logprobs(micro).logprobs
            scored.sum().backward()
            found.append(scored.detach())
        policy.step()
        found.append(policy.reference_logprobs(micro))
    return found


def furthest(wanted: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Return the largest relative difference of a pair of tensors."""
    pairs = zip(wanted, got, strict=True)
    return max(float((a - b).norm() / (a.norm() + 1e-12)) for a, b in pairs)


@pytest.mark.parametrize("placements", [None, MIXED, (None,) * LAYERS])
@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_streamed_is_resident(folder: Path, precision: str, placements: Placements | None) -> None:
    one, two = (load(folder, precision, 0, placements) for _ in range(2))
    streamed = load(folder, precision, STREAM, placements)
    assert streamed_layers(streamed.model) == STREAM
    assert streamed.wrapped == one.wrapped
    wanted = first_step(one)
    noise = furthest(wanted, first_step(two))
    got = furthest(wanted, first_step(streamed))
    print(f"first step: {got:.2e}, run-to-run noise {noise:.2e}")
    assert got <= 2 * noise + 1e-6
    for policy in (one, two, streamed):
        policy.optimizer.zero_grad()
    wanted = steps(one)
    noise = furthest(wanted, steps(two))
    got = furthest(wanted, steps(streamed))
    print(f"{STEPS} steps: {got:.2e}, run-to-run noise {noise:.2e}")
    assert got <= 3 * noise + 1e-5


def test_samples_are_those_of_resident_layers(folder: Path) -> None:
    made = []
    for layers in (0, STREAM, LAYERS):
        policy = load(folder, "nf4", layers, None)
        engine = TransformersEngine(
            policy.model, policy.tokenizer, stop_ids=[], context=256, max_sequences=8,
            device=policy.device, cuda_graphs=bool(layers),
        )  # fmt: skip
        # Streamed layers switch the graphs off; the resident ones go without, to compare.
        engine.set_weights(policy.weights())
        out = engine.generate([[5, 6, 7], [8, 9]], 4, SamplingParams(32, seed=1))
        made.append([one.token_ids for prompt in out for one in prompt])
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_memory_falls_by_the_layers_less_two_slots(folder: Path, precision: str) -> None:
    clear()
    start = requested()
    policy = load(folder, precision, 0, None)
    resident = requested() - start
    del policy
    clear()
    torch.cuda.reset_peak_memory_stats()
    policy = load(folder, precision, STREAM, None)
    streamed = requested() - start
    peak = requested("peak") - start
    layers: Any = getattr(policy.model.get_base_model(), STREAMED)
    assert all(block.is_pinned() for block in layers._blocks)
    one = len(layers._blocks[0])
    assert resident - streamed == pytest.approx((STREAM - 2) * one, rel=0.02)
    # While it is loaded, at most one weight in 16 bits and its codes are there besides.
    assert peak < streamed + 4 * 2 * 1024 * 2816 + 2**20
    blocks = list(layers._blocks)
    del policy, layers
    clear()
    torch.cuda.synchronize()
    assert not any(block.is_pinned() for block in blocks)
