"""Policies for vLLM on a GPU, and comparisons of completions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.config import LoraConfig, ModelConfig, OptimConfig
from rlsloth.policy.policy import Policy
from rlsloth.records import Completion, Weights


@pytest.fixture(scope="module", params=["bf16", "nf4"])
def policy(request, tmp_path_factory) -> Policy:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(hidden=256, layers=4).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    return Policy.load(
        ModelConfig(path=str(folder), precision=request.param),
        LoraConfig(rank=12),
        OptimConfig(),
        temperature=1.0,
        total_updates=1,
    )


def changed(policy: Policy, version: int) -> Weights:
    """Change the policy's adapter at random. Returns its weights."""
    with torch.no_grad():
        for name, p in policy.weights().tensors.items():
            if "lora_B" in name:
                p.normal_(0, 0.05 * version)
    return Weights(version, "adapter", policy.weights().tensors)


def used() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def differences(found: list[list[Completion]], wanted: list[list[Completion]]) -> list[Any]:
    """List unequal completions: the first token that differs, and the largest difference of
    log-probs before it."""
    unequal = []
    for g, groups in enumerate(zip(found, wanted, strict=True)):
        for i, (a, b) in enumerate(zip(*groups, strict=True)):
            if a != b:
                pairs = zip(a.token_ids, b.token_ids, strict=False)
                first = next((at for at, (x, y) in enumerate(pairs) if x != y), None)
                before = zip(a.logprobs[:first], b.logprobs[:first], strict=False)
                unequal.append((g, i, first, max((abs(x - y) for x, y in before), default=0.0)))
    return unequal
