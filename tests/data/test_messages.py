"""Conversations under the names and in the shapes that datasets have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.examples import renderer, shown
from rlsloth.config.data import PreferenceDataConfig, SftDataConfig
from rlsloth.data.messages import read_message, read_messages
from rlsloth.data.pairs import pair_examples
from rlsloth.data.sft import sft_examples
from rlsloth.errors import UserError

CALL = {"name": "f", "arguments": {"x": 1}}
FULL = {"type": "function", "function": CALL}


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("GPT", "assistant"), ("model", "assistant"), ("bot", "assistant"),
     ("observation", "tool"), ("ipython", "tool"), ("System", "system")],
)  # fmt: skip
def test_roles_of_other_names(name: str, role: str) -> None:
    assert read_message({"from": name, "value": "x"}, "m") == {"role": role, "content": "x"}


@pytest.mark.parametrize(
    "calls",
    [
        [FULL],
        [CALL],
        CALL,
        json.dumps([CALL]),
        [{"name": "f", "arguments": '{"x": 1}'}],
        [{"name": "f", "parameters": {"x": 1}}],
        [{"function": {"name": "f", "arguments": '{"x": 1}'}, "type": "function"}],
    ],
)
def test_tool_calls_of_every_form(calls: Any) -> None:
    message = read_message({"role": "assistant", "content": None, "tool_calls": calls}, "m")
    assert message == {"role": "assistant", "content": "", "tool_calls": [FULL]}


def test_calls_in_other_places() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    (call,) = read_message(old, "m")["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {}}
    said = read_message({"from": "function_call", "value": json.dumps(CALL)}, "m")
    assert said["tool_calls"] == [FULL]
    assert read_message({"from": "function_call", "value": "f(1)"}, "m")["content"] == "f(1)"
    kept = {"id": "7", "type": "function", "function": CALL}
    (call,) = read_message({"role": "assistant", "tool_calls": [kept]}, "m")["tool_calls"]
    assert json.dumps(call) == json.dumps(kept)  # also the order of keys


@pytest.mark.parametrize("result", [None, "", "4", {"sum": 4}, [1, 2], 4])
def test_results_of_tools(result: Any) -> None:
    message = read_message({"role": "tool", "content": result, "tool_call_id": 3}, "m")
    text = result or "" if isinstance(result, str | None) else json.dumps(result)
    assert message == {"role": "tool", "content": text, "tool_call_id": "3"}


def test_content_in_parts() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a", "image": None},
             {"type": "text", "text": "b"}]  # fmt: skip
    assert read_message({"role": "assistant", "content": parts}, "m") == {
        "role": "assistant",
        "content": "ab",
        "reasoning_content": "hm",
    }
    with pytest.raises(UserError, match=r"m: .*part of type 'image_url'"):
        read_message({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "m")


def test_keys_of_reasoning() -> None:
    for key in ("reasoning", "reasoning_content", "thinking"):
        turn = {"role": "assistant", "content": "4", key: "two and two"}
        assert read_message(turn, "m")["reasoning_content"] == "two and two"
    both = {"role": "assistant", "content": "4", "reasoning": "a", "thinking": "b"}
    with pytest.raises(UserError, match="two different texts of reasoning"):
        read_message(both, "m")


def test_shapes_of_conversations() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for value in (turns, json.dumps(turns), [{"input": "a", "output": "b"}],
                  {"role": ["user", "assistant"], "content": ["a", "b"]}, ["a", "b"]):  # fmt: skip
        assert read_messages(value, "m", texts=True) == turns
    assert read_messages(turns[0], "m") == turns[:1]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "wizard", "content": "a"}, "this is 'wizard'"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "only an assistant's message"),
        ({"role": "user", "content": "a", "reasoning": "x"}, "only an assistant's message"),
        ({"role": "assistant", "tool_calls": 5}, "expected a list of calls, this is a int"),
        ({"role": "assistant", "tool_calls": [{}]}, "tool call 1: a call has a name"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "not JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, "JSON object"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "'weight': a turn is learnt"),
        ({"role": "assistant", "content": "a", "reasoning": "\ud83d"}, "half of a surrogate pair"),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]},
            "half",
        ),
        ({"role": "tool", "content": "a", "name": ["f"]}, "'name': expected text"),
    ],
)
def test_messages_that_are_refused(message: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        read_message(message, "d row 3, message 1")
    assert str(refused.value).startswith("d row 3, message 1")


def test_turns_of_weight_zero_are_context() -> None:
    turns: list[Any] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 1},
    ]
    (example,) = sft_examples([{"messages": turns}], SftDataConfig(), renderer(), "d")
    assert shown(example).count("[") == 1
    assert shown(example).endswith("[d<|im_end|>]")
    turns[3]["train"] = False
    with pytest.raises(UserError, match="every assistant turn has weight 0"):
        sft_examples([{"messages": turns}], SftDataConfig(), renderer(), "d")


def test_arguments_as_text_are_learnt_like_those_as_objects() -> None:
    def learnt(arguments: Any) -> str:
        turns = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {
                "name": "weather", "arguments": arguments}}]},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "Rain."},
        ]  # fmt: skip
        return shown(sft_examples([{"messages": turns}], SftDataConfig(), renderer(), "d")[0])

    assert learnt('{"town": "Graz"}') == learnt({"town": "Graz"})


@pytest.mark.parametrize("tools", ["\ud800", [{"function": {"name": "\ud800"}}], 5, [3], "[3]"])
def test_tools_that_are_refused(tools: Any) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match=r"d row 1, column 'tools'"):
        sft_examples([{"messages": turns, "tools": tools}], SftDataConfig(), renderer(), "d")


def test_system_column_and_system_turn() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    system = [{"role": "system", "content": "s"}]
    same, apart = (
        sft_examples([row], SftDataConfig(), renderer(), "d")[0]
        for row in (
            {"system": "s", "messages": [*system, *turns]},
            {"system": "s", "messages": turns},
        )
    )
    assert shown(same) == shown(apart)
    assert shown(same).startswith("<|im_start|>system\ns<|im_end|>")
    with pytest.raises(UserError, match=r"row 1: the column 'system' and a system turn .* differ"):
        sft_examples(
            [{"system": "t", "messages": [*system, *turns]}], SftDataConfig(), renderer(), "d"
        )
    row = {"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}
    (pair,) = pair_examples([row], PreferenceDataConfig(), renderer(), "d")
    assert shown(pair) == shown(same)
