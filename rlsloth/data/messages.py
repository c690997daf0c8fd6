"""Read conversations: messages under the names and in the shapes that datasets have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlsloth.data.content import first_of, read_content
from rlsloth.data.text import check_encodable, check_text, kind, parse_text
from rlsloth.data.tool_calls import read_tool_calls
from rlsloth.errors import UserError
from rlsloth.records import Message

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant",
    "tool": "tool", "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "ai": "assistant", "chatbot": "assistant",
    "bing": "assistant", "bard": "assistant", "function": "tool", "function_response": "tool",
    "tool_response": "tool", "tool_result": "tool", "observation": "tool", "ipython": "tool",
    "environment": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""Role in a dataset, in lower case -> role of a message."""
_CALLS = ("function_call", "tool_call")
"""Roles whose content is a tool call if it is JSON."""
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = ("weight", "train", "trainable", "loss")
"""Keys of a turn that say whether it is learnt."""
_KNOWN = {"role", "content", "name", "tool_call_id", "tool_calls", "reasoning_content", "weight"}
_PAIRS = (
    ("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("input", "output"),
    ("instruction", "output"), ("prompt", "response"), ("question", "answer"),
)  # fmt: skip
"""Keys of a dict that holds a user turn and the answer to it."""


def read_messages(
    value: Any, where: str, keys: dict[str, None] | None = None, *, texts: bool = False
) -> list[Message]:
    """Read a conversation, which may be empty.

    Args:
        value: messages, one message, their JSON text, dicts of a question and its answer, or a dict
            of lists.
        where: place of the conversation, for messages.
        keys: unknown keys of messages are added here.
        texts: the value may also be a list of texts, of the user and the assistant in turn.

    Raises:
        UserError: the value is none of these, or a message is malformed.
    """
    if isinstance(value, str):
        value = parse_text(value, where)
    items = _items(value, where)
    if texts and items and all(isinstance(item, str) for item in items):
        roles = ("user", "assistant")
        items = [{"role": roles[i % 2], "content": item} for i, item in enumerate(items)]
    return [read_message(m, f"{where}, message {i}", keys) for i, m in enumerate(items, 1)]


def decoded(value: Any) -> Any:
    """Return the messages that a text holds as JSON, or the value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] != "[":
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if is_conversation(found) else value


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(m, Mapping) and any(key in m for key in ROLE_KEYS) for m in value)
    )


def _items(value: Any, where: str) -> Sequence[Any]:
    """List the messages in a value of any shape, not yet read."""
    if isinstance(value, Mapping):
        lists = {k: v for k, v in value.items() if isinstance(v, list | tuple)}
        if lists and len(lists) == len(value) and any(key in lists for key in ROLE_KEYS):
            if len({len(v) for v in lists.values()}) > 1:
                raise UserError(f"{where}: its lists have different lengths; correct the row")
            names = list(lists)
            return [
                dict(zip(names, values, strict=True))
                for values in zip(*lists.values(), strict=True)
            ]
        value = [value]
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: expected text or a list of messages, this is {kind(value)}")
    return [message for item in value for message in _apart(item)]


def _apart(item: Any) -> list[Any]:
    """Take a dict of a question and its answer apart."""
    if isinstance(item, Mapping) and not any(key in item for key in ROLE_KEYS):
        for asks, answers in _PAIRS:
            if asks in item and answers in item:
                return [
                    {"role": "user", "content": item[asks]},
                    {"role": "assistant", "content": item[answers]},
                ]
    return [item]


def read_message(value: Any, where: str, keys: dict[str, None] | None = None) -> Message:
    """Read a message under any of the known names of its keys and roles.

    Args:
        value: the message.
        where: its place, for messages.
        keys: unknown keys are added here.

    Raises:
        UserError: the message is malformed.
    """
    if _is_plain(value):
        if value["role"] not in ("system", "tool"):
            check_text(value["content"], where)
        check_encodable(value["content"], where)
        return dict(value)
    found = first_of(value, ROLE_KEYS) if isinstance(value, Mapping) else None
    said = found.strip().lower() if isinstance(found, str) else ""
    if said not in ROLES:
        got = f", this is {found!r}" if isinstance(found, str) else ""
        raise UserError(
            f"{where}: a message has a role (system, developer, user, assistant, tool) and "
            f"content{got}"
        )
    # Arrow fills the keys that other messages have with null.
    given = {key: item for key, item in value.items() if item is not None}
    message: Message = {"role": ROLES[said]}
    content = first_of(given, CONTENT_KEYS)
    if said in _CALLS and not (isinstance(content, str) and content.strip()[:1] not in ("{", "[")):
        given["tool_calls"], content = content, ""
    _read_calls(message, given, where)
    text, thought = read_content(content, message["role"], where)
    if not text and message.get("tool_calls"):
        text = ""
    if text is None:
        raise UserError(f"{where}: content must be text, this is {kind(content)}")
    message["content"] = text
    _read_reasoning(message, given, thought, where)
    _read_weight(message, given, where)
    _read_others(message, given, where, keys)
    if not message.get("tool_calls") and message["role"] not in ("system", "tool"):
        check_text(text, where)
    check_encodable(message, where)
    return message


def _is_plain(value: Any) -> bool:
    """Whether a value is a message as most are, of a known role and text."""
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        return False
    role = value["role"]
    return isinstance(value["content"], str) and isinstance(role, str) and ROLES.get(role) == role


def _read_calls(message: Message, given: dict[str, Any], where: str) -> None:
    """Read the tool calls of an assistant turn, also those in OpenAI's old key function_call."""
    calls = given.get("tool_calls")
    if calls is None and given.get("function_call"):
        calls = [given["function_call"]]
    if not calls and not isinstance(calls, int | float):
        return
    if message["role"] != "assistant":
        raise UserError(
            f"{where}: only an assistant's message has tool_calls, this one is the "
            f"{message['role']}'s; remove them"
        )
    message["tool_calls"] = read_tool_calls(calls, where)


def _read_reasoning(message: Message, given: dict[str, Any], thought: str, where: str) -> None:
    """Put the reasoning of an assistant turn in ``reasoning_content``, the name in templates."""
    texts = [thought] if thought else []
    for name in REASONING_KEYS:
        value = given.get(name)
        if isinstance(value, str):
            texts += [value] if value and value not in texts else []
        elif value:
            raise UserError(f"{where}, {name!r}: expected text, this is {kind(value)}")
    if len(texts) > 1:
        raise UserError(
            f"{where}: has two different texts of reasoning under {', '.join(REASONING_KEYS)}; "
            "keep one"
        )
    if not texts:
        return
    if message["role"] != "assistant":
        raise UserError(
            f"{where}: only an assistant's message has reasoning, this one is the "
            f"{message['role']}'s; remove it"
        )
    message["reasoning_content"] = texts[0]


def _read_weight(message: Message, given: dict[str, Any], where: str) -> None:
    """Read whether an assistant turn is learnt: ``weight`` 0 if it is not."""
    if message["role"] != "assistant":
        return
    for name in WEIGHT_KEYS:
        value = given.get(name, True)
        if value not in (0, 1):
            raise UserError(
                f"{where}, {name!r}: a turn is learnt (1, true) or not (0, false), this is "
                f"{value!r}; write one of them"
            )
        if not value:
            message["weight"] = 0


def _read_others(
    message: Message, given: dict[str, Any], where: str, keys: dict[str, None] | None
) -> None:
    """Keep the remaining keys for the chat template, and note those that are not known."""
    read = {*ROLE_KEYS, *REASONING_KEYS, *WEIGHT_KEYS, *_KNOWN, "function_call"}
    content = next((name for name in CONTENT_KEYS if name in given), "content")
    for name in ("name", "tool_call_id"):
        if isinstance(given.get(name), int):
            given[name] = str(given[name])
        if not isinstance(given.get(name, ""), str):
            raise UserError(f"{where}, {name!r}: expected text, this is {kind(given[name])}")
        if name in given:
            message[name] = given[name]
    for name, value in given.items():
        if name in read or name == content:
            continue
        if keys is not None and value not in ("", [], {}):
            keys[str(name)] = None
        if _is_json(value):
            message[name] = value


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
