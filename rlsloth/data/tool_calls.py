"""Tool calls of datasets in any form, and text that shows calls to a model whose template does not.

Texts in this file are read by the model: changing them changes what it is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsloth.data.text import check_encodable, parse_text
from rlsloth.errors import UserError
from rlsloth.records import Message


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call that the model wrote."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None
    """Reason why the call cannot be made, written for the model; None for a well-formed call."""


def call_message(call_id: str, call: ToolCall) -> dict[str, Any]:
    """Convert a call to an entry of a message's ``tool_calls``."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call_id, "type": "function", "function": function}


def read_tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Read the tool calls of a message in OpenAI's form.

    Args:
        value: calls with or without the key ``function``, one call, or the JSON text of these. The
            arguments of a call may be JSON text, too.
        where: place of the message, for messages.

    Raises:
        UserError: a call has no name, or its arguments are no JSON object.
    """
    if isinstance(value, str):
        value = parse_text(value, f"{where}, tool_calls")
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list | tuple):
        raise UserError(
            f"{where}, tool_calls: expected a list of calls, this is a {type(value).__name__}"
        )
    return [_read_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls, 1)]


def _read_call(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_text(value, where)
    inner = value.get("function") if isinstance(value, Mapping) else None
    found = inner if isinstance(inner, Mapping) else value
    name = found.get("name") if isinstance(found, Mapping) else None
    if not isinstance(name, str) or not name:
        raise UserError(
            f'{where}: a call has a name and arguments: {{"name": "f", "arguments": {{...}}}}'
        )
    given: Any = next(
        (found[k] for k in ("arguments", "parameters") if found.get(k) is not None), {}
    )
    arguments = parse_text(given, where) if isinstance(given, str) and given else given or {}
    if not isinstance(arguments, Mapping):
        raise UserError(
            f"{where}: the arguments of {name!r} must be a JSON object, or one as text, this is a "
            f"{type(arguments).__name__}"
        )
    function = {k: v for k, v in found.items() if v is not None and k not in ("id", "type")}
    if function.get("arguments") is None:
        function.pop("parameters", None)
    function["arguments"] = dict(arguments)
    if found is inner:
        return {k: v for k, v in value.items() if v is not None} | {"function": function}
    ids = {"id": found["id"]} if found.get("id") is not None else {}
    return {**ids, "type": "function", "function": function}


def read_tools(value: Any, where: str) -> list[Any]:
    """Read a row's own tools: JSON schemas, or their JSON text.

    A schema without the key ``function`` is put in one, the form that templates take.

    Raises:
        UserError: the value is no list of JSON objects.
    """
    where = f"{where}, column 'tools'"
    if isinstance(value, str) and value.strip():  # how datasets keep schemas that differ
        value = parse_text(value, where)
    schemas = [value] if isinstance(value, Mapping) else value or []
    if not isinstance(schemas, list | tuple):
        raise UserError(
            f"{where}: expected a list of JSON schemas, this is a {type(value).__name__}"
        )
    return [_read_tool(schema, where) for schema in schemas]


def _read_tool(value: Any, where: str) -> dict[str, Any]:
    tool = parse_text(value, where) if isinstance(value, str) else value
    if not isinstance(tool, Mapping):
        raise UserError(f"{where}: a tool is a JSON schema, this is a {type(tool).__name__}")
    check_encodable(tool, where)
    if "name" in tool and "function" not in tool:
        return {"type": "function", "function": dict(tool)}
    return dict(tool)


def tools_as_text(messages: list[Message], tools: Sequence[Any]) -> list[Message]:
    """Write tools and calls into a conversation as text, for a template that does not render them.

    Args:
        messages: the conversation.
        tools: JSON schemas of the tools.
    """
    turns = [_turn_as_text(message) for message in messages]
    if not tools:
        return turns
    schemas = "\n".join(json.dumps(tool) for tool in tools)
    words = (
        f"You can call these tools:\n<tools>\n{schemas}\n</tools>\n"
        "To call one, write its name and arguments as JSON:\n"
        '<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>\n'
        "The result comes back between <tool_response> and </tool_response>."
    )
    if turns and turns[0]["role"] == "system":
        words = f"{turns[0]['content']}\n\n{words}"
        turns = turns[1:]
    return [{"role": "system", "content": words}, *turns]


def _turn_as_text(message: Message) -> Message:
    content = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    for call in message.get("tool_calls") or ():
        written = json.dumps({k: call["function"][k] for k in ("name", "arguments")})
        content = f"{content}\n<tool_call>\n{written}\n</tool_call>".lstrip()
    return {"role": message["role"], "content": content}
