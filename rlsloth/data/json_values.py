"""Values of columns as JSON holds them: rewards run in other processes, runs resume from JSON."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Mapping
from typing import Any

from rlsloth.data.text import is_text, kind
from rlsloth.errors import UserError


class UnsendableError(Exception):
    """A value that JSON cannot hold, such as a picture."""


def as_json(value: Any, where: str) -> Any:
    """Convert a value to what JSON holds.

    Raises:
        UnsendableError: JSON cannot hold the value.
        UserError: the value has half of a surrogate pair.
    """
    if value is None or isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else _dumped(value)
    if not is_text(text):
        raise UserError(f"{where}: holds half of a surrogate pair, which is not text")
    return value if isinstance(value, str) else json.loads(text)


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, default=_converted, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsendableError(str(error)) from None


def _converted(item: Any) -> Any:
    if isinstance(item, datetime.date | datetime.time):
        return item.isoformat()
    if isinstance(item, datetime.timedelta | decimal.Decimal):
        return str(item)
    if isinstance(item, Mapping):
        return dict(item)
    raise TypeError(f"it holds {kind(item)}")
