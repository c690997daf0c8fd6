"""Policies whose weights vLLM shares, and engines that sample from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.policy.policy import Policy
from rlsloth.records import SamplingParams
from rlsloth.rollout.vllm.engine import VllmEngine

SHARED = list(range(70, 170))
"""A prefix of several blocks."""
PREFIXES = [[*SHARED, 5, 6], [*SHARED, 7], [9, 10, 11]]
SAMPLING = SamplingParams(max_tokens=10, seed=1)


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Return a function that makes a policy on a tiny Llama with heads of 32, as vLLM needs."""

    def make(precision: str = "fp32", *, tied: bool = False, hidden: int = 128, **lora: Any) -> Any:
        folder = tmp_path / "model"
        tiny_llama(hidden=hidden, tied=tied).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        torch.manual_seed(0)
        policy = Policy.load(
            ModelConfig(path=str(folder), precision=precision, device="cpu"),
            LoraConfig(**lora),
            OptimConfig(lr=1e-2, schedule="constant"),
            temperature=1.0,
            total_updates=10,
        )
        with torch.no_grad():
            for name, p in policy.weights().tensors.items():
                if "lora_B" in name or "embedding_A" in name:
                    p.normal_(0, 0.05)
        return policy

    return make


@contextmanager
def start(policy: Policy, **changes: Any) -> Iterator[VllmEngine]:
    settings: dict[str, Any] = {
        "stop_ids": [2],
        "context": 256,
        "max_sequences": 16,
        "dtype": policy.dtype,
        "device": policy.device,
        "kv_cache": "auto",
        "kv_bytes": 64 * 2**20,
    }
    engine = VllmEngine(policy.model, policy.tokenizer, **(settings | changes))
    try:
        yield engine
    finally:
        engine.close()


def vllm_model(engine: VllmEngine) -> Any:
    return engine._llm.collective_rpc(lambda worker: worker.model_runner.model)[0]
