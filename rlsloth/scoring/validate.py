"""Checks of a reward's return value: a list of one finite number, or None, per completion."""

from __future__ import annotations

import math
from typing import Any

from rlsloth.scoring.protocol import Failure, FailureKind


class InvalidReturnError(Exception):
    """A return value, or one score in it, has the wrong form."""

    def __init__(self, kind: FailureKind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def validate(result: Any, rows: int) -> tuple[list[float | None], list[Failure]]:
    """Split a return value into values by row (None: not applicable, or failed) and failures.

    Python, numpy and torch numbers and booleans count as numbers; text does not.

    Raises:
        InvalidReturnError: not a list, or not one score for each completion.
    """
    if isinstance(result, (str, bytes, dict)) or not hasattr(result, "__len__"):
        kind = type(result).__name__
        raise InvalidReturnError(
            "wrong type", f"returned {kind} in place of a list of {rows} numbers"
        )
    items = list(result)
    if len(items) != rows:
        raise InvalidReturnError(
            "wrong length", f"returned {len(items)} scores for {rows} completions"
        )
    values: list[float | None] = []
    failures: list[Failure] = []
    for row, item in enumerate(items):
        try:
            values.append(None if item is None else _finite(item))
        except InvalidReturnError as error:
            values.append(None)
            failures.append(Failure(row=row, kind=error.kind, detail=str(error)))
    return values, failures


def _finite(item: Any) -> float:
    not_a_number = InvalidReturnError(
        "wrong type", f"a score is {type(item).__name__}, not a number"
    )
    if isinstance(item, (str, bytes)):
        raise not_a_number
    try:
        value = float(item)
    except OverflowError:
        raise InvalidReturnError("not finite", "a score is too large for a float") from None
    except (TypeError, ValueError):
        raise not_a_number from None
    if not math.isfinite(value):
        raise InvalidReturnError("not finite", f"a score is {value}")
    return value
