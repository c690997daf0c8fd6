"""Embedded engines on a tiny random Llama."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from helpers.tiny import tiny_llama, tiny_tokenizer
from rlsloth.policy.attention import interface as attention
from rlsloth.records import Completion
from rlsloth.rollout.embedded.engine import TransformersEngine

CONTEXT = 96
EOS = 2
STOP_IDS = (EOS, *range(40, 52))
"""So many end tokens that a random model reaches one now and then."""
PROMPTS = [[5], [7, 9, 11, 13, 200, 31], [17] * 23, [3, 4], list(range(60, 71)), [7, 9]]


@pytest.fixture(scope="module")
def model() -> Any:
    attention.register()
    model = tiny_llama(context=CONTEXT)
    model.set_attn_implementation(attention.NAME)
    return model


@pytest.fixture
def make_engine(model: Any) -> Callable[..., TransformersEngine]:
    def make(max_sequences: int = 64, stop_ids: Sequence[int] = STOP_IDS) -> TransformersEngine:
        return TransformersEngine(
            model,
            tiny_tokenizer(),
            stop_ids=stop_ids,
            context=CONTEXT,
            max_sequences=max_sequences,
            device=torch.device("cpu"),
        )

    return make


def tokens(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids for c in group] for group in completions]
