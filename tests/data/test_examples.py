"""SFT rows as token ids and masks, in every format and under very different templates."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from helpers.examples import renderer, shown
from helpers.tiny import CHATML, SPECIAL, tiny_tokenizer
from rlsloth.config.data import SftDataConfig
from rlsloth.data.example import Example
from rlsloth.data.renderer import Renderer
from rlsloth.data.sft import sft_examples
from rlsloth.errors import UserError

QWEN3 = (
    "{%- for m in messages %}{%- set content = m.content %}{%- set reasoning = '' %}"
    "{%- if m.role == 'assistant' and '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}"
    "{{- '<think>\n' + reasoning + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""A template that renders reasoning in the last turn only."""
R1 = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>' + m.content }}"
    "{%- else %}{{- '<|endoftext|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|endoftext|><think>\n' }}{%- endif %}"
)
"""A template that never renders reasoning, but opens it in the generation prompt."""
NO_END = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TWO_TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nciao"},
]


def sft(rows: list[dict[str, Any]], template: str | None = CHATML, **cfg: Any) -> list[Example]:
    return sft_examples(rows, SftDataConfig(**cfg), renderer(template), "d.jsonl")


def test_all_of_text_is_in_the_loss_with_an_end_token() -> None:
    assert shown(sft([{"text": "abc"}])[0]) == "a | [bc<|im_end|>]"


def test_begin_token_is_not_in_the_loss() -> None:
    (example,) = sft_examples(
        [{"text": "ab"}], SftDataConfig(), renderer(None, bos=True), "d.jsonl"
    )
    assert shown(example) == "<|endoftext|> | [ab<|im_end|>]"


def test_prompt_and_completion_as_text() -> None:
    assert shown(sft([{"prompt": "2+2=", "completion": "4"}])[0]) == "2+2= | [4<|im_end|>]"


def test_completion_after_a_conversation() -> None:
    row = {"prompt": [{"role": "user", "content": "2+2"}]}
    as_text, as_turns = (
        sft([{**row, "completion": value}])[0]
        for value in ("4", [{"role": "assistant", "content": "4"}])
    )
    assert shown(as_text) == shown(as_turns)
    assert shown(as_text) == (
        "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n | [4<|im_end|>]"
    )


def test_question_and_answer_columns_are_a_conversation() -> None:
    (example,) = sft([{"question": "2+2", "answer": "4"}], system_prompt="sum")
    assert shown(example) == (
        "<|im_start|>system\nsum<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n"
        "<|im_start|>assistant\n | [4<|im_end|>]"
    )


def test_all_assistant_turns_and_nothing_else() -> None:
    (example,) = sft([{"messages": TWO_TURNS}])
    assert shown(example) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n | [<think>\nhm\n</think>\n\nhello<|im_end|>]"
        "\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
        "[<think>\nso\n</think>\n\nciao<|im_end|>]"
    )


def test_mask_is_that_of_generation_markers() -> None:
    marked = tiny_tokenizer(MARKED)
    wanted = marked.apply_chat_template(
        TWO_TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (example,) = sft([{"messages": TWO_TURNS}])
    ids, mask = example.answers[0]
    count = len(example.prompt_ids) + len(ids)
    assert [*example.prompt_ids, *ids] == wanted["input_ids"][:count]
    assert [0] * len(example.prompt_ids) + mask.tolist() == wanted["assistant_masks"][:count]
    assert not any(wanted["assistant_masks"][count:])  # the newline after the last turn


def test_a_template_that_drops_earlier_reasoning_makes_an_example_a_turn() -> None:
    first, second = sft([{"messages": TWO_TURNS}], QWEN3)
    assert shown(first).endswith("hi<|im_end|>\n<|im_start|>assistant\n | "
                                 "[<think>\nhm\n</think>\n\nhello<|im_end|>]")  # fmt: skip
    assert shown(second).endswith(
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n"
        "<|im_start|>assistant\n | [<think>\nso\n</think>\n\nciao<|im_end|>]"
    )
    assert first.question == second.question  # held out together


def test_a_template_that_never_shows_reasoning_still_learns_it() -> None:
    row = {"prompt": TWO_TURNS[1:2], "completion": TWO_TURNS[2:3]}
    (example,) = sft([row], R1)
    assert shown(example) == (
        "<|im_start|>hi<|endoftext|><think>\n | [hm\n</think>\n\nhello<|im_end|>]"
    )


def test_an_answer_without_reasoning_closes_what_the_prompt_opens() -> None:
    (example,) = sft([{"question": "hi", "answer": "ho"}], R1)
    assert shown(example) == ("<|im_start|>hi<|endoftext|><think>\n | [\n</think>\n\nho<|im_end|>]")


def test_reasoning_in_a_field_of_its_own() -> None:
    turn = {"role": "assistant", "content": "hello", "reasoning_content": "hm"}
    (example,) = sft([{"prompt": TWO_TURNS[1:2], "completion": [turn]}], R1)
    assert shown(example).endswith("<think>\n | [hm\n</think>\n\nhello<|im_end|>]")


def test_an_end_token_after_the_last_turn_alone_splits_nothing() -> None:
    """Phi-3's template writes one."""
    template = CHATML + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    assert len(sft([{"messages": TWO_TURNS}], template)) == 1


def test_tokens_are_those_of_the_whole_text_with_a_sentencepiece_tokenizer() -> None:
    """It adds a space before a separate text, but not before one that continues another."""
    tokenizer = metaspace_tokenizer()
    made = Renderer(tokenizer, SftDataConfig())
    messages = [TWO_TURNS[1], {"role": "assistant", "content": "hello you"}] * 2
    (example,) = sft_examples([{"messages": messages}], SftDataConfig(), made, "d.jsonl")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [*example.prompt_ids.tolist(), *example.answers[0][0].tolist()]
    assert ids == whole[: len(ids)]
    (plain,) = sft_examples(
        [{"prompt": "A: ", "completion": "ho"}], SftDataConfig(), made, "d.jsonl"
    )
    assert tokenizer.convert_ids_to_tokens(plain.answers[0][0].tolist())[:2] == ["h", "o"]


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of characters that marks spaces and adds one in front, as SentencePiece does."""
    letters = [*SPECIAL, "\u2581", *map(chr, range(33, 127)), "\n"]
    backend = Tokenizer(BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", additional_special_tokens=SPECIAL[:2]
    )
    made.chat_template = CHATML.replace("'<|im_start|>' + message", "message").replace(
        "<|im_start|>assistant", "assistant"
    )
    return made


def test_precedence_of_columns() -> None:
    both = {"prompt": "2+2=", "completion": "4", "text": None, "messages": None}
    assert shown(sft([both])[0]) == "2+2= | [4<|im_end|>]"
    chat = {"messages": TWO_TURNS, "text": "flat", "prompt": "hi"}
    assert shown(sft([chat])[0]) == shown(sft([{"messages": TWO_TURNS}])[0])
    assert shown(sft([chat], prompt_column="messages")[0]).count("[") == 2


def test_a_template_without_an_end_of_turn_gets_the_end_token() -> None:
    (example,) = sft([{"question": "hi", "answer": "ho"}], NO_END)
    assert shown(example) == "### user:\nhi\n\n### assistant:\n | [ho<|im_end|>]"
    several = sft([{"messages": TWO_TURNS[1:]}], NO_END)
    assert len(several) == 2  # an end token between turns is not what the template writes


def test_loss_on_all() -> None:
    (example,) = sft([{"prompt": "2+2=", "completion": "4"}], loss_on="all")
    assert shown(example) == "2 | [+2=4<|im_end|>]"


def test_completion_may_have_tool_turns_which_are_not_learnt() -> None:
    turns = [
        {"role": "assistant", "content": "look", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "name": "f", "content": "7"},
        {"role": "assistant", "content": "seven"},
    ]  # fmt: skip
    (example,) = sft([{"prompt": [{"role": "user", "content": "q"}], "completion": turns}])
    learnt = re.findall(r"\[(.*?)\]", shown(example), re.DOTALL)
    assert learnt[0].startswith("look\n<tool_call>")
    assert learnt[-1] == "seven<|im_end|>"
    assert "7" not in "".join(learnt)
    assert "7" in shown(example)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"a": "x"}], "has none of the columns completion, solution"),
        ([{"prompt": "x", "completion": " "}], "d.jsonl row 1, completion: empty"),
        ([{"text": ""}], "d.jsonl row 1, column 'text': empty"),
        ([{"text": 3}], "expected text, this is int"),
        ([{"messages": TWO_TURNS[:2]}], "row 1: the conversation has no assistant turn"),
        ([{"messages": TWO_TURNS[2:]}], "begins with an assistant turn"),
        (
            [{"prompt": TWO_TURNS[1:3], "completion": "x"}],
            "the prompt ends with an assistant turn",
        ),
        ([{"prompt": "x", "completion": 3}], "the completion must be text"),
        ([{"question": "x", "answer": []}], "expected text or a list of messages"),
        ([{"text": "<|im_end|>"}], "has a single token"),
        (
            [{"messages": [{"role": "system", "content": "\ud800"}, *TWO_TURNS[1:]]}],
            "half of a surrogate pair",
        ),
        (
            [{"messages": TWO_TURNS, "chat_template_kwargs": {"tokenize": True}}],
            "chat_template_kwargs must be a mapping without the keys add_generation_prompt",
        ),
    ],
)
def test_rows_that_are_refused(rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        sft(rows)
    assert "\n" not in str(refused.value)
