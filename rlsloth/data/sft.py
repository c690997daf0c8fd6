"""Rows for supervised fine-tuning in TRL's formats: text, prompt and completion, or messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rlsloth.config.data import SftDataConfig
from rlsloth.data.example import Example, make_example
from rlsloth.data.heldout import question_text
from rlsloth.data.prompts import (
    PROMPT_COLUMNS,
    check_text,
    make_prompts,
    named_column,
    read_message,
    row_tools,
)
from rlsloth.data.renderer import Renderer, template_kwargs
from rlsloth.data.rows import Row
from rlsloth.data.turns import Answer, end_id, spoken
from rlsloth.errors import UserError
from rlsloth.records import Message, Prompt

COMPLETION_COLUMNS = ("completion", "answer", "solution", "response", "output")


def sft_examples(
    rows: Sequence[Row], cfg: SftDataConfig, renderer: Renderer, source: str
) -> list[Example]:
    """Make at least one example from each row, in the rows' order.

    If rows have several formats, prompt and completion come first, then ``messages``, then
    ``text``. A completion is a string or messages: a string continues a prompt that is a plain
    string, and is an assistant turn after messages. In ``messages``, the loss is on the assistant's
    turns; in ``text``, on everything, with an end token.

    Args:
        rows: the rows.
        cfg: the section ``data``.
        renderer: renders conversations to tokens.
        source: name of the dataset, for messages.

    Raises:
        UserError: columns are missing, or a row is empty, malformed or has no token for the loss.
    """
    columns = list(dict.fromkeys(c for row in rows for c, v in row.items() if v is not None))
    kind = _kind(columns, cfg)
    if kind == "text":
        return [_text(row, i, renderer, f"{source} row {i + 1}") for i, row in enumerate(rows)]
    if kind == "messages":
        found = []
        for i, row in enumerate(rows):
            found += _conversation(row, i, cfg, renderer, f"{source} row {i + 1}")
        return found
    column = completion_column(columns, cfg.completion_column, source)
    chat = any(isinstance(row.get(column), list) for row in rows)
    prompts = make_prompts(rows, cfg, source, conversational=chat, scored=False)
    return [
        make_example(prompt.index, question_text(prompt), [_loss_on(answer, cfg)])
        for prompt, row in zip(prompts, rows, strict=True)
        for answer in completed(
            renderer, prompt, row.get(column), f"{source} row {prompt.index + 1}, {column}"
        )
    ]


def _kind(columns: list[str], cfg: SftDataConfig) -> Literal["completion", "messages", "text"]:
    """Choose the rows' format by their columns."""
    if cfg.prompt_column == "messages":
        return "messages"
    has_prompt = any(column in columns for column in PROMPT_COLUMNS if column != "messages")
    has_answer = any(column in columns for column in COMPLETION_COLUMNS)
    if cfg.prompt_column or cfg.completion_column or (has_prompt and has_answer):
        return "completion"
    if "messages" in columns:
        return "messages"
    return "text" if "text" in columns else "completion"


def completion_column(columns: list[str], wanted: str | None, source: str) -> str:
    """Name the column with completions.

    Args:
        columns: columns of the dataset.
        wanted: value of ``data.completion_column``.
        source: name of the dataset, for messages.

    Raises:
        UserError: there is no such column.
    """
    have = f"(columns: {', '.join(columns)})"
    if wanted is not None:
        return named_column(columns, wanted, source)
    for column in COMPLETION_COLUMNS:
        if column in columns:
            return column
    raise UserError(
        f"{source} has none of the columns {', '.join(COMPLETION_COLUMNS)}, messages, text: pass "
        f"the column of completions with --data.completion-column {have}"
    )


def completed(renderer: Renderer, prompt: Prompt, value: Any, where: str) -> list[Answer]:
    """Tokenise a prompt with its completion, which is a string or messages.

    Raises:
        UserError: the completion is malformed, or the chat template refuses it.
    """
    if isinstance(prompt.messages, str):
        if not isinstance(value, str):
            raise UserError(
                f"{where}: the prompt is text, so the completion must be text, but this is "
                f"{type(value).__name__}; make both text, or both messages"
            )
        check_text(value, where)
        return [continued(renderer, prompt.messages, value)]
    messages = list(prompt.messages)
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{where}: the prompt ends with an assistant turn; move it to the completion"
        )
    turns = read_turns(value, where)
    own = template_kwargs(prompt.columns.get("chat_template_kwargs"), where)
    return spoken(renderer, [*messages, *turns], len(messages), where, prompt.tools, own)


def read_turns(value: Any, where: str) -> list[Message]:
    """Read messages; a text means one assistant turn.

    Raises:
        UserError: the value is neither, or empty.
    """
    if isinstance(value, str):
        check_text(value, where)
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected text or a list of messages")
    return [read_message(m, f"{where}, message {i}") for i, m in enumerate(value, 1)]


def continued(renderer: Renderer, prompt: str, completion: str) -> Answer:
    """Plain text after plain text, and an end token."""
    prompt_ids = renderer.ids(prompt, begins=True)
    token_ids = renderer.next_ids(prompt, prompt_ids, completion)
    if not renderer.ends.end(completion):
        token_ids = [*token_ids, end_id(renderer)]
    return Answer(prompt_ids, token_ids, [True] * len(token_ids))


def _text(row: Row, index: int, renderer: Renderer, where: str) -> Example:
    text = row.get("text")
    if not isinstance(text, str):
        raise UserError(
            f"{where}, column 'text': expected text, this is {type(text).__name__}; fill it or "
            "drop the row"
        )
    check_text(text, f"{where}, column 'text'")
    ids = renderer.ids(text, begins=True)
    if not renderer.ends.end(text):
        ids.append(end_id(renderer))
    if len(ids) < 2:
        raise UserError(
            f"{where}, column 'text': {text!r} has a single token, after which nothing can be "
            "predicted; drop the row"
        )
    return make_example(index, text, [Answer(ids[:1], ids[1:], [True] * (len(ids) - 1))])


def _conversation(
    row: Row, index: int, cfg: SftDataConfig, renderer: Renderer, where: str
) -> list[Example]:
    messages = read_turns(row.get("messages"), f"{where}, column 'messages'")
    if cfg.system_prompt is not None:
        messages = [m for m in messages if m["role"] != "system"]
        messages.insert(0, {"role": "system", "content": cfg.system_prompt})
    tools = row_tools(row.get("tools"), where)
    own = template_kwargs(row.get("chat_template_kwargs"), where)
    answers = spoken(renderer, messages, 0, where, tools, own)
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    question = question_text(Prompt(index, tuple(messages[:first]), {}))
    return [make_example(index, question, [_loss_on(a, cfg)]) for a in answers]


def _loss_on(answer: Answer, cfg: SftDataConfig) -> Answer:
    """Extend the loss to the prompt, except its first token, if ``data.loss_on`` says so."""
    if cfg.loss_on == "answers":
        return answer
    ids = answer.prompt_ids + answer.token_ids
    return Answer(ids[:1], ids[1:], [True] * (len(ids) - 1))
