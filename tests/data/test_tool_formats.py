"""Tool calls in the form of the model's own template: found, parsed, rendered and answered."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.tiny import tiny_tokenizer
from rlsloth.config import EnvConfig
from rlsloth.config.data import SftDataConfig
from rlsloth.data.renderer import Renderer
from rlsloth.data.sft import sft_examples
from rlsloth.data.tool_calls import ToolCall
from rlsloth.records import Message, Prompt

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string"}, "limit": {"type": "integer"}},
            },
        },
    }
]
HEAD = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
TAIL = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(calls: str) -> str:
    """A ChatML template with these marks around a message's calls."""
    return (
        HEAD + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}" + calls + "{% endif %}<|im_end|>\n{% endfor %}" + TAIL
    )


EACH = "{% for c in m.tool_calls %}{% set f = c.function %}"
ARGUMENTS = "{% for k, v in f.arguments.items() %}"
WRITTEN = "{{ v if v is string else v | tojson }}"
TEMPLATES = {
    "hermes": template(EACH + "<tool_call>{{ f | tojson }}</tool_call>{% endfor %}"),
    "xml": template(
        EACH
        + "<tool_call>\n<function={{ f.name }}>\n"
        + ARGUMENTS
        + "<parameter={{ k }}>\n"
        + WRITTEN
        + "\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
    ),
    "arg_keys": template(
        EACH
        + "\n<tool_call>{{ f.name }}\n"
        + ARGUMENTS
        + "<arg_key>{{ k }}</arg_key>\n<arg_value>"
        + WRITTEN
        + "</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    ),
    "pythonic": template(
        "<|tool_call_start|>["
        + EACH
        + "{{ f.name }}("
        + ARGUMENTS
        + '{{ k }}={{ "\'" + v + "\'" if v is string else v }}'
        "{{ ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]"
        "<|tool_call_end|>"
    ),
    "mistral": template(
        "[TOOL_CALLS][" + EACH + '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }},'
        ' "id": "{{ c.id }}"}{{ ", " if not loop.last }}{% endfor %}]'
    ),
    "deepseek": template(
        "<\uff5ctool▁calls▁begin\uff5c>" + EACH + "<\uff5ctool▁call▁begin\uff5c>function"
        "<\uff5ctool▁sep\uff5c>{{ f.name }}\n```json\n{{ f.arguments | tojson }}\n```"
        "<\uff5ctool▁call▁end\uff5c>{% endfor %}<\uff5ctool▁calls▁end\uff5c>"
    ),
    "bare_json": template(
        "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
        + EACH
        + '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}{% endfor %}'
    ),
}
HARMONY = (
    HEAD + "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|im_start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "<|im_start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
    "{{ f.arguments | tojson }}<|call|>"
    "{% else %}<|im_start|>assistant<|channel|>final<|message|>{{ m.content }}<|im_end|>{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
TEMPLATES["harmony"] = HARMONY
CALL = ToolCall("find", {"code": "007", "limit": 3})
MALFORMED = {
    "hermes": '<tool_call>{"name": "find"',
    "xml": "<tool_call>\n<function=find>\n<parameter=code>\n7",
    "arg_keys": "<tool_call>find\n<arg_key>code</arg_key>\n",
    "pythonic": "<|tool_call_start|>[find(7)]<|tool_call_end|>",
    "mistral": '[TOOL_CALLS][{"name": "find"',
    "deepseek": "<\uff5ctool▁call▁begin\uff5c>find<\uff5ctool▁sep\uff5c>{",
    "bare_json": '{"name": "find", "parameters": {',
    "harmony": " to=functions.find<|channel|>commentary json<|message|>{",
}


def renderer(form: str) -> Renderer:
    tokenizer = tiny_tokenizer(TEMPLATES[form])
    marks = ["<|channel|>", "<|message|>", "<|end|>", "<|call|>"] if form == "harmony" else []
    tokenizer.add_tokens(marks, special_tokens=True)
    ends = tokenizer.convert_tokens_to_ids(["<|call|>"]) if marks else []
    return Renderer(tokenizer, EnvConfig(), eos_token_ids=ends)


def calling(call: ToolCall = CALL) -> Message:
    function = {"name": call.name, "arguments": call.arguments}
    entry = {"id": "0" * 9, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [entry]}


USER: Message = {"role": "user", "content": "hi"}


def written(chat: Renderer) -> str:
    """The call as the template writes it, as sampling would decode it."""
    before = chat.render([USER], TOOLS, "x")
    whole = chat.render([USER, calling()], TOOLS, "x", whole=True)
    assert whole.startswith(before)
    return chat.decode(chat.ids(whole.removeprefix(before)))


@pytest.mark.parametrize("form", TEMPLATES)
def test_the_form_of_the_template_is_found_and_parsed(form: str) -> None:
    chat = renderer(form)
    found = chat._tool_format
    assert found is not None
    assert found.name == form
    assert chat.parse_tool_calls(written(chat), TOOLS) == [CALL]
    assert chat.parse_tool_calls(f"<think>{written(chat)}</think>no call", TOOLS) == []
    rendered = chat.render([USER], TOOLS, "x")
    assert "You can call these tools" not in rendered  # the Hermes text of templates without tools


@pytest.mark.parametrize("form", MALFORMED)
def test_a_malformed_call_says_so(form: str) -> None:
    (call,) = renderer(form).parse_tool_calls(MALFORMED[form], TOOLS)
    assert call.error is not None
    assert "malformed" in call.error


@pytest.mark.parametrize("form", TEMPLATES)
def test_an_answer_without_a_call_has_none(form: str) -> None:
    chat = renderer(form)
    for answer in ("The answer is [1, 2].", '{"a": 1}', "f(x) = 3", ""):
        assert chat.parse_tool_calls(answer, TOOLS) == []


@pytest.mark.parametrize("form", TEMPLATES)
def test_results_continue_as_the_template_would(form: str) -> None:
    chat = renderer(form)
    tokenizer = chat.tokenizer
    prompt_ids = chat.prompt_ids(Prompt(0, (USER,), {}, tuple(TOOLS)))
    before = chat.render([USER], TOOLS, "x")
    whole = chat.render([USER, calling()], TOOLS, "x", whole=True)
    turn = chat.ids(whole.removeprefix(before).rstrip())
    result: Message = {"role": "tool", "name": "find", "content": "9"}
    ids = [*prompt_ids, *turn, *chat.reply_ids(turn, [result])]
    answered = {**result, "tool_call_id": "0" * 9}
    assert tokenizer.decode(ids) == chat.render([USER, calling(), answered], TOOLS, "x")


def test_calls_in_several_turns_of_gpt_oss() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.find <|constrain|>json<|message|>{"code": "1"}<|call|>'
    )
    assert renderer("harmony").parse_tool_calls(text) == [ToolCall("find", {"code": "1"})]
    preamble = "<|channel|>commentary<|message|>I will look.<|end|>"
    assert renderer("harmony").parse_tool_calls(preamble) == []


def test_reasoning_goes_where_the_template_puts_it() -> None:
    turn = {"role": "assistant", "content": "so 4", "reasoning_content": "2 and 2"}
    tokenizer = renderer("harmony").tokenizer
    chat = Renderer(tokenizer, EnvConfig())
    row = {"messages": [USER, turn]}
    (example,) = sft_examples([row], SftDataConfig(), chat, "rows")
    ((ids, mask),) = example.answers
    assert all(mask)
    assert tokenizer.decode(ids) == (
        "<|channel|>analysis<|message|>2 and 2<|end|><|im_start|>assistant<|channel|>final"
        "<|message|>so 4<|im_end|>"
    )


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_call_is_learnt_with_one_end(form: str) -> None:
    tokenizer = renderer(form).tokenizer
    row = {"messages": [USER, calling()], "tools": TOOLS}
    (example,) = sft_examples([row], SftDataConfig(), Renderer(tokenizer, EnvConfig()), "rows")
    ((ids, mask),) = example.answers
    learnt = tokenizer.decode(ids[mask])
    assert learnt.endswith("<|call|>" if form == "harmony" else "<|im_end|>")
    assert learnt.count("<|im_end|>") + learnt.count("<|call|>") == 1
    assert "find" in learnt
