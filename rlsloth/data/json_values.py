"""Values of columns as JSON holds them: rewards run in other processes, runs resume from JSON."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlsloth.data.rows import Row
from rlsloth.data.text import check_encodable, kind
from rlsloth.errors import UserError


def unsendable_columns(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """List the columns with values that JSON cannot hold, such as pictures."""
    found = []
    for column in columns:
        try:
            for row in rows:
                _plain(row.get(column))
        except (TypeError, ValueError, RecursionError):
            found.append(column)
    return found


def jsonable(value: Any, where: str) -> Any:
    """Convert a value to what JSON holds: rewards run in other processes, runs resume from JSON.

    Raises:
        UserError: JSON cannot hold the value, or it has half of a surrogate pair.
    """
    try:
        plain = _plain(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: {kind(value)} cannot be sent to reward processes as JSON ({error}); drop "
            "the column, or convert it to text"
        ) from None
    if not isinstance(plain, int | float | None):
        check_encodable(plain, where)
    return plain


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    return json.loads(json.dumps(value, default=_converted))


def _converted(item: Any) -> Any:
    if isinstance(item, datetime.date | datetime.time):
        return item.isoformat()
    if isinstance(item, datetime.timedelta | decimal.Decimal):
        return str(item)
    if isinstance(item, Mapping):
        return dict(item)
    raise TypeError(f"it holds {kind(item)}")
