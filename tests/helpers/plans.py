"""Policies and model folders whose memory is planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.families import FAMILIES, family_model
from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.cli import main as cli
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.memory.activations import Stream, layer_memory
from rlsloth.memory.read_shape import read_shape
from rlsloth.memory.terms import Plan
from rlsloth.policy.load import LoadedModel
from rlsloth.policy.policy import Policy

WIDE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
    "head_dim": 16, "max_position_embeddings": 8192, "sliding_window": None,
}  # fmt: skip
LLAMA = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
"""Sizes of a Llama of about a billion parameters, for LlamaConfig."""
EXPERTS = ("qwen3_moe", "gpt_oss")


def make_policy(
    family: str,
    checkpointing: bool = True,
    dtype: torch.dtype = torch.float32,
    name: str = "adamw",
    *,
    dora: bool = False,
) -> Policy:
    window = {"sliding_window": 100_000} if FAMILIES[family].get("sliding_window") else {}
    model = family_model(family, **WIDE | window).to(dtype)
    if family in EXPERTS:
        model.set_experts_implementation("grouped_mm")
    return Policy(
        LoadedModel(model, tiny_tokenizer(), torch.device("cpu"), dtype),
        ModelConfig(gradient_checkpointing=checkpointing), LoraConfig(rank=8, dora=dora),
        OptimConfig(name=name), temperature=1.0, total_updates=1,
    )  # fmt: skip


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    tiny_llama(hidden=128).save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def run(folder: Path, *more: str) -> int:
    longest = () if "--env.train" in more else ("--longest-prompt", "50")
    return cli.main(["plan", "--model.path", str(folder), *longest, *more])


def lasting(plan: Plan) -> int:
    """Bytes of rollouts that are needed for more than a moment."""
    return sum(term.rollout for term in plan.terms if not term.moment)


def bytes_a_token(policy: Policy, checkpointing: bool) -> float:
    """Estimate the bytes that a token adds to the peak."""
    shape, size = read_shape(policy.model), policy.dtype.itemsize
    layers = [layer_memory(x, shape.hidden, size, Stream(40, 40, 3)) for x in shape.layers]
    inputs = len(layers) * shape.hidden * size
    if checkpointing:
        return inputs + max(each for x in layers for each, _ in x.moments)
    kept = inputs + sum(x.kept for x in layers)
    return kept + max(each - x.kept for x in layers for each, _ in x.moments)


def state_bytes(policy: Policy) -> int:
    """Bytes of the optimizer's states; tables that several share count once."""
    states = policy.optimizer.state.values()
    seen = {
        t.data_ptr(): t.nbytes for s in states for t in s.values() if isinstance(t, torch.Tensor)
    }
    return sum(seen.values())
