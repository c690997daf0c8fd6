"""Prompts from rows in TRL's dataset formats."""

from __future__ import annotations

import datetime
import decimal
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlsloth.config import DatasetConfig
from rlsloth.data.heldout import split_heldout
from rlsloth.data.rows import Row, load_rows, parse_json
from rlsloth.errors import UserError, nearest
from rlsloth.records import Message, Prompt

PROMPT_COLUMNS = ("prompt", "question", "problem", "messages")
ROLES = ("system", "developer", "user", "assistant", "tool")
NOT_PASSED = ("prompt", "completion", "completion_ids")
"""Columns that TRL's trainers do not pass on to rewards."""


def make_prompts(
    rows: Sequence[Row],
    cfg: DatasetConfig,
    source: str,
    tools: Sequence[Any] = (),
    conversational: bool = False,
    scored: bool = True,
) -> list[Prompt]:
    """One prompt a row, in the rows' order.

    A string in the column ``prompt`` is continued unchanged (TRL's standard format); a string in
    any other column, or any string when there is a system prompt, is one user message. The system
    prompt replaces a row's own. Of ``messages`` the last assistant turn is left out. A row's own
    ``tools`` follow those given. Columns but NOT_PASSED are kept, None where a row lacks one.

    Args:
        source: what to call the data in errors.
        tools: JSON schemas offered with every prompt.
        conversational: make strings in the column ``prompt`` user messages too.
        scored: rewards will see the columns; else only those of the chat template are kept.

    Raises:
        UserError: the prompt column is missing, or a row's prompt is empty or malformed.
    """
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    column = _prompt_column(columns, cfg, source)
    for name in ("prompts", "completions"):
        if scored and name in columns:
            raise UserError(f"{source}: rewards are called with {name!r}; rename that column")
    passed = [c for c in columns if c not in NOT_PASSED]
    if not scored:
        passed = [c for c in passed if c == "chat_template_kwargs"]
    chat = conversational or column != "prompt" or cfg.system_prompt is not None
    prompts = []
    for index, row in enumerate(rows):
        where = f"{source} row {index + 1}"
        messages = _prompt(row.get(column), chat, cfg.system_prompt, f"{where}, column {column!r}")
        own_tools = row_tools(row.get("tools"), where)
        values = {c: _jsonable(row.get(c), f"{where}, column {c!r}") for c in passed}
        prompts.append(Prompt(index, messages, values, (*tools, *own_tools)))
    return prompts


def load_prompts(
    cfg: DatasetConfig, seed: int, make: Callable[[list[Row], str], list[Prompt]]
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of the data that ``cfg.train`` and ``cfg.validation`` name.

    Args:
        make: prompts of rows, given what to call the rows in errors.
    """
    train = make(load_rows(cfg.train, cfg.train_split, cfg.limit), cfg.train)
    if cfg.validation is None:
        return split_heldout(train, cfg.heldout, seed, cfg.SECTION)
    return train, make(load_rows(cfg.validation, cfg.validation_split), cfg.validation)


def named_column(columns: list[str], wanted: str, source: str) -> str:
    """The column ``wanted``. Raises UserError where there is none of that name."""
    if wanted not in columns:
        have = f"(columns: {', '.join(columns)})"
        raise UserError(f"{source} has no column {wanted!r}{nearest(wanted, columns)} {have}")
    return wanted


def _prompt_column(columns: list[str], cfg: DatasetConfig, source: str) -> str:
    have = f"(columns: {', '.join(columns)})"
    if cfg.prompt_column is not None:
        return named_column(columns, cfg.prompt_column, source)
    for column in PROMPT_COLUMNS:
        if column in columns:
            return column
    near = next((hint for c in PROMPT_COLUMNS if (hint := nearest(c, columns))), "")
    raise UserError(
        f"{source} has none of the columns {', '.join(PROMPT_COLUMNS)}: "
        f"name yours with --{cfg.SECTION}.prompt-column{near} {have}"
    )


def _prompt(
    value: Any, chat: bool, system_prompt: str | None, where: str
) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        check_text(value, where)
        if not chat:
            return value
        messages = [{"role": "user", "content": value}]
    elif isinstance(value, list | tuple):
        messages = [read_message(m, f"{where}, message {i}") for i, m in enumerate(value, 1)]
        # `messages` are whole conversations; in other columns a last assistant turn is a prefill.
        if where.endswith("'messages'") and messages and messages[-1]["role"] == "assistant":
            messages.pop()
    else:
        raise UserError(f"{where}: expected text or a list of messages, this is {_kind(value)}")
    if not messages:
        raise UserError(f"{where}: no messages to answer")
    if system_prompt is not None:
        messages = [m for m in messages if m["role"] != "system"]
        messages.insert(0, {"role": "system", "content": system_prompt})
    return tuple(messages)


def read_message(value: Any, where: str) -> Message:
    """A row's message, checked; ``where`` names its place in errors. Raises UserError."""
    if not isinstance(value, Mapping) or value.get("role") not in ROLES:
        raise UserError(f"{where}: a message has a role ({', '.join(ROLES)}) and content")
    # Arrow fills the keys that other messages have with null.
    message = {key: item for key, item in value.items() if item is not None}
    if message.get("tool_calls"):
        message.setdefault("content", "")
    content = message.get("content")
    if not isinstance(content, str):
        raise UserError(f"{where}: content must be text, this is {_kind(content)}")
    if not message.get("tool_calls") and message["role"] != "system":
        check_text(content, where)
    _check_encodable(content, where)
    return message


def check_text(text: str, where: str) -> None:
    """Raises UserError for text that is empty or cannot be encoded."""
    if not text.strip():
        raise UserError(f"{where}: empty")
    _check_encodable(text, where)


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is not text") from None


def row_tools(value: Any, where: str) -> list[Any]:
    """A row's own tools: JSON schemas, or their JSON. Raises UserError."""
    if isinstance(value, str):  # how datasets keep schemas that differ in their fields
        value = parse_json(value.encode(), f"{where}, column 'tools'")
    if not isinstance(value, list | None):
        raise UserError(f"{where}, column 'tools': expected a list of JSON schemas")
    return value or []


def _jsonable(value: Any, where: str) -> Any:
    """The value as JSON holds it: rewards run in other processes, runs are resumed from JSON."""

    def convert(item: Any) -> Any:
        if isinstance(item, datetime.date | datetime.time):
            return item.isoformat()
        if isinstance(item, decimal.Decimal):
            return str(item)
        raise UserError(
            f"{where}: {_kind(item)} cannot be sent to reward processes as JSON; drop the column, "
            "or convert it to text"
        )

    if value is None or isinstance(value, str | int | float):
        return value
    return json.loads(json.dumps(value, default=convert))


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
