"""Checks of text and JSON that come from outside."""

from __future__ import annotations

import json
from typing import Any

from rlsloth.errors import UserError, first_line


def is_text(value: str) -> bool:
    """Whether a string can be encoded: it holds no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(text: bytes, where: str) -> Any:
    """Parse JSON.

    Args:
        text: JSON in UTF-8.
        where: place of the text, for messages.

    Raises:
        UserError: the text is not JSON; the message names the place in it.
    """
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 at byte {error.start}; save the file in UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise UserError(f"{where}: not JSON ({error.msg}, {place}); correct it") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number too long
        raise UserError(f"{where}: cannot read this JSON: {first_line(error)}") from None


def parse_text(text: str, where: str) -> Any:
    """Parse JSON in a string. Raises UserError if it is not JSON, or no text."""
    check_encodable(text, where)
    return parse_json(text.encode(), where)


def check_text(text: str, where: str) -> None:
    """Raises UserError for text that is empty or cannot be encoded."""
    if not text.strip():
        raise UserError(f"{where}: empty")
    check_encodable(text, where)


def check_encodable(value: Any, where: str) -> None:
    """Raises UserError for a value with half of a surrogate pair, or that JSON cannot hold."""
    if isinstance(value, str):
        sound = is_text(value)
    else:
        try:
            sound = is_text(json.dumps(value, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{where}: JSON cannot hold it ({error}); drop the row") from None
    if not sound:
        raise UserError(f"{where}: holds half of a surrogate pair, which is not text")


def kind(value: Any) -> str:
    """Name a value's type, for messages."""
    return "null" if value is None else f"a {type(value).__name__}"
