"""Checks of a worker's messages: a reward runs in the worker, and may write anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

from rlsloth.errors import DETAIL_LIMIT
from rlsloth.scoring.protocol import Failure, FailureKind, Ready, Reply, RewardInfo

ROW_BYTES = 1 << 20
"""Bytes of a reply for each completion, those of ``log_extra`` included."""
BASE_BYTES = 1 << 20
"""Bytes of a reply besides those for completions."""
MAX_METRICS = 1000
"""Metrics that one call may log."""
MAX_NAME = 200
"""Characters of a metric's or column's name."""
KINDS = get_args(FailureKind)


class InvalidReplyError(Exception):
    """A message of a worker is too long or has another form; the text says which."""


def most_bytes(rows: int) -> int:
    """Bytes of the longest reply to a call with that many completions."""
    return BASE_BYTES + rows * ROW_BYTES


def check_ready(message: Any, rewards: int) -> Ready:
    """Check a worker's first message. Raises InvalidReplyError."""
    error = _part(message, "error", str, None)
    infos = [] if error is not None else _list(message, "rewards", rewards)
    return Ready(rewards=[_info(info) for info in infos], error=error)


def _info(info: Any) -> RewardInfo:
    accepts = _part(info, "accepts", list, None)
    return RewardInfo(
        accepts=None if accepts is None else _names(accepts),
        required=_names(_part(info, "required", list)),
        parameters=_names(_part(info, "parameters", list)),
    )


def _names(value: list[Any]) -> list[str]:
    if not all(isinstance(item, str) for item in value):
        raise InvalidReplyError("a parameter's name is no text")
    return value


def check_reply(message: Any, call: int, rows: int, reserved: Sequence[str]) -> Reply:
    """Check the reply to a call.

    Args:
        message: what JSON gave.
        call: number of the call.
        rows: number of its completions.
        reserved: names of metrics that a reward may not log, as shell patterns.

    Raises:
        InvalidReplyError: it has another form, or belongs to another call.
    """
    if _part(message, "call", int) != call:
        raise InvalidReplyError("it belongs to another call")
    error = message.get("error")
    return Reply(
        call=call,
        values=[_score(v) for v in _list(message, "values", 0 if error is not None else rows)],
        row_failures=[_failure(f, rows) for f in _list(message, "row_failures")],
        error=None if error is None else _failure(error, rows),
        user_error=_part(message, "user_error", str, None),
        metrics=_metrics(_list(message, "metrics"), reserved),
        extras=_extras(message, rows),
        retire=_part(message, "retire", bool),
    )


def _part(message: Any, key: str, *kinds: type | None) -> Any:
    """A part of a message, of one of the types; None among them: it may be null."""
    if not isinstance(message, dict) or key not in message:
        raise InvalidReplyError(f"it has no {key!r}")
    value = message[key]
    if not any(value is None if kind is None else type(value) is kind for kind in kinds):
        raise InvalidReplyError(f"{key!r} is {type(value).__name__}")
    return value


def _list(message: Any, key: str, length: int | None = None) -> list[Any]:
    value: list[Any] = _part(message, key, list)
    if length is not None and len(value) != length:
        raise InvalidReplyError(f"{key!r} has {len(value)} items in place of {length}")
    return value


def _score(value: Any) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if not math.isfinite(number):
        raise InvalidReplyError("a score is not finite")
    return number


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise InvalidReplyError(f"{type(value).__name__} in place of a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _failure(value: Any, rows: int) -> Failure:
    row, kind = _part(value, "row", int), _part(value, "kind", str)
    if kind not in KINDS or not 0 <= row < max(rows, 1):
        raise InvalidReplyError(f"a failure of kind {kind[:40]!r} in row {row}")
    return Failure(row=row, kind=kind, detail=_part(value, "detail", str)[: 2 * DETAIL_LIMIT])


def _metrics(items: list[Any], reserved: Sequence[str]) -> list[tuple[str, float]]:
    if len(items) > MAX_METRICS:
        raise InvalidReplyError(f"{len(items)} metrics, more than {MAX_METRICS}")
    found = []
    for item in items:
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
            raise InvalidReplyError("a metric is no pair of name and number")
        name, value = item[0], _number(item[1])
        if len(name) > MAX_NAME or any(fnmatchcase(name, pattern) for pattern in reserved):
            raise InvalidReplyError(f"the metric {name[:40]!r} is the trainer's, or too long")
        found.append((name, value))
    return found


def _extras(message: Any, rows: int) -> dict[str, list[Any]]:
    extras: dict[str, list[Any]] = _part(message, "extras", dict)
    for name, values in extras.items():
        if len(name) > MAX_NAME or not isinstance(values, list) or len(values) != rows:
            raise InvalidReplyError(f"the column {name[:40]!r} has no value for each completion")
    return extras
