"""Helpers that start vLLM engines and compare their completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlsloth.policy.plain_logprobs import plain_logprobs
from rlsloth.policy.policy import Policy
from rlsloth.records import Completion
from rlsloth.rollout.vllm.engine import VllmEngine

CONTEXT = 256
CACHE = 256 * 2**20
EOS = 2
QUESTIONS = ["What is 17 + 25?", "Name a colour.", "State the sum of 3 and 4 in one word."]
LONG = "Count with me: " + ", ".join(str(i) for i in range(40)) + ". Go on from there. "
"""Longer than several blocks of the prefix cache."""


def make(policy: Policy, **changes: object) -> VllmEngine:
    settings: dict[str, Any] = {
        "stop_ids": [EOS],
        "context": CONTEXT,
        "max_sequences": 64,
        "dtype": policy.dtype,
        "device": policy.device,
        "kv_cache": "auto",
        "kv_bytes": CACHE,
    }
    return VllmEngine(policy.model, policy.tokenizer, **(settings | changes))


def chat(policy: Policy, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    rendered = policy.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return list(rendered["input_ids"])


def tokens(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in completions]


def logprobs(completions: list[list[Completion]]) -> list[float]:
    return [x for group in completions for c in group for x in c.logprobs]


def gap(
    policy: Policy, prefixes: Sequence[list[int]], completions: list[list[Completion]]
) -> torch.Tensor:
    """Each token's |difference of log-probs| from the trainer's now, by transformers' modules."""
    want = [
        plain_logprobs(policy, prefix, c.token_ids)
        for prefix, group in zip(prefixes, completions, strict=True)
        for c in group
    ]
    return (torch.tensor(logprobs(completions)) - torch.cat(want).cpu()).abs()
