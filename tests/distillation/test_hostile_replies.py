"""Replies of an endpoint with parts replaced at random: a sample or one UserError, nothing else."""

from __future__ import annotations

import json
import random
from typing import Any

from rlsloth.distillation.chat_reply import SPARE_TOKENS, Reply, read_reply
from rlsloth.errors import UserError, visible

LIMIT = 100
GOOD = {
    "model": "adder",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "The sum is 5"},
                 "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 7},
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**7, 1e308, float("nan"), "\x1b]0;x\x07", "\ud800", [], {}, [[[]]],
    "x" * 300_000, {"message": {}}, [None] * 1000, {"content": [{"type": "text", "text": "5"}]},
)  # fmt: skip


def mutated(value: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one part replaced, dropped or doubled."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        changed = {**value, key: mutated(value[key], chance)}
        if chance.random() < 0.15:
            changed.pop(key)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.75:
        at = chance.randrange(len(value))
        return [*value[:at], mutated(value[at], chance), *value[at + chance.randrange(2) :]]
    return chance.choice(ODD)


def test_a_mutated_reply_is_a_bounded_sample_or_one_line() -> None:
    chance = random.Random(1)
    refused: list[str] = []
    for _ in range(3000):
        reply = mutated(GOOD, chance)
        if not isinstance(reply, dict):  # the client refuses it before
            continue
        try:
            sample = read_reply(reply, 1, "http://server/v1", LIMIT)
        except UserError as error:
            refused.append(str(error))
            continue
        assert isinstance(sample, Reply)
        assert 0 <= sample.tokens <= LIMIT + SPARE_TOKENS
        assert len(sample.text) <= 1024 * (LIMIT + SPARE_TOKENS)
        assert len(sample.finish) <= 200
        json.dumps([sample.text, sample.finish, sample.model]).encode()
        assert sample.rollout().length == sample.tokens
    assert len(refused) > 1000
    assert max(map(len, refused)) < 600
    assert all(visible(text).isprintable() for text in refused)
