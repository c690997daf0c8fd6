"""Read the content of a message: text, parts of text, or a tool's result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlsloth.data.text import kind
from rlsloth.errors import UserError


def read_content(content: Any, role: str, where: str) -> tuple[str | None, str]:
    """Read the text of a content, and the reasoning among its parts."""
    if isinstance(content, str):
        return content, ""
    if role == "tool" and not _is_parts(content):  # a result that no one has written as text
        return ("" if content is None else _as_json(content, where)), ""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list | tuple) or not content:
        return None, ""
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        name = part.get("type", "text") if isinstance(part, Mapping) else kind(part)
        into = thoughts if name in ("thinking", "reasoning") else texts
        text = first_of(part, ("text", str(name))) if isinstance(part, Mapping) else None
        if name not in ("text", "input_text", "output_text", "thinking", "reasoning") or (
            not isinstance(text, str)
        ):
            raise UserError(
                f"{where}: content must be text or parts of type text, this has a part of type "
                f"{name!r}; drop the row"
            )
        into.append(text)
    return "".join(texts), "".join(thoughts)


def _is_parts(content: Any) -> bool:
    """Whether a tool's result is parts of text, not JSON of its own."""
    return isinstance(content, list | tuple) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    )


def _as_json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise UserError(
            f"{where}: content must be text, this is {kind(value)} that JSON cannot hold"
        ) from None


def first_of(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the first value that is not None under one of several names."""
    return next((value[name] for name in names if value.get(name) is not None), None)
