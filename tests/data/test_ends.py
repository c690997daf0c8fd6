"""Ends of turns are written once; tokens of a long conversation are those of its text."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from helpers.tiny import CHATML, tiny_tokenizer
from rlsloth.config import EnvConfig
from rlsloth.config.data import SftDataConfig
from rlsloth.data.example import Example
from rlsloth.data.renderer import Renderer
from rlsloth.data.sft import sft_examples

END = "<|im_end|>"


def example(row: dict[str, Any], **cfg: Any) -> tuple[str, str]:
    """All text of a row's only example, and its text in the loss."""
    renderer = Renderer(tiny_tokenizer(), EnvConfig())
    (found,) = sft_examples([row], SftDataConfig(**cfg), renderer, "rows")
    ((ids, mask),) = found.answers
    trained = renderer.tokenizer.decode(ids[mask])
    return renderer.tokenizer.decode(np.concatenate([found.prompt_ids, ids])), trained


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]


@pytest.mark.parametrize("space", ["", "\n", " \n\n"])
def test_an_end_in_the_data_is_not_doubled(space: str) -> None:
    whole, _ = example({"text": f"hi there{END}{space}"})
    assert whole.count(END) == 1
    whole, trained = example({"prompt": "hi ", "completion": f"ok{END}{space}"})
    assert whole.count(END) == 1
    assert trained == f"ok{END}{space}"
    user, answer = CHAT
    turns = [user, {**answer, "content": f"ok{END}{space}"}]
    assert example({"messages": turns}) == example({"messages": CHAT})
    assert example({"question": "hi", "answer": f"ok{END}{space}"}) == example({"messages": CHAT})


def test_text_behind_an_end_gets_an_end_of_its_own() -> None:
    whole, _ = example({"text": f"one{END}\ntwo"})
    assert whole.endswith(f"two{END}")


def test_an_end_inside_a_turn_stays() -> None:
    user, answer = CHAT
    whole, _ = example({"messages": [user, {**answer, "content": f"a {END} b"}]})
    assert f"a {END} b{END}" in whole


def conversation(turns: int) -> dict[str, Any]:
    said = [f"question {i} of many, " * 20 for i in range(turns)]
    return {
        "messages": [
            message
            for text in said
            for message in (
                {"role": "user", "content": text},
                {"role": "assistant", "content": f"answer to {text}"},
            )
        ]
    }


def made(turns: int) -> Example:
    renderer = Renderer(tiny_tokenizer(), EnvConfig())
    (found,) = sft_examples([conversation(turns)], SftDataConfig(), renderer, "rows")
    return found


def test_tokens_of_a_conversation_are_those_of_its_text() -> None:
    found = made(6)
    tokenizer = tiny_tokenizer(CHATML)
    text = tokenizer.apply_chat_template(conversation(6)["messages"], tokenize=False)
    whole = tokenizer(text)["input_ids"]
    ((ids, _),) = found.answers
    joined = [*found.prompt_ids, *ids]
    assert joined == whole[: len(joined)]
    assert tokenizer.decode(whole[len(joined) :]).strip() == ""


def test_the_work_is_linear_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that are tokenised, for eight times as many turns."""
    count = 0
    original = Renderer.ids

    def counted(self: Renderer, text: str, *, begins: bool = False) -> list[int]:
        nonlocal count
        count += len(text)
        return original(self, text, begins=begins)

    monkeypatch.setattr(Renderer, "ids", counted)
    seen = []
    for turns in (8, 64):
        count = 0
        started = time.perf_counter()
        made(turns)
        seen.append(count)
        assert time.perf_counter() - started < 30
    assert seen[1] < 10 * seen[0]
