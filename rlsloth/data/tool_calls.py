"""Tool calls, and the text that shows them to a model whose chat template does not.

Texts in this file are read by the model: changing them changes what it is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
