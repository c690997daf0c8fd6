"""Checks what a reward returned: a list with one finite number, or None, for each completion."""

from __future__ import annotations

import math
from typing import Any

from rlsloth.scoring.protocol import Failure, FailureKind


class InvalidReturnError(Exception):
    """What a reward returned, or one score in it, is not what it has to be."""

    def __init__(self, kind: FailureKind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def validate(result: Any, rows: int) -> tuple[list[float | None], list[Failure]]:
    """Values by row (None where not applicable or failed), and the rows that failed.

    Python, numpy and torch numbers and booleans count as numbers; text does not.

    Raises:
        InvalidReturnError: not a list, or not as long as there are completions.
    """
    if isinstance(result, (str, bytes, dict)) or not hasattr(result, "__len__"):
        kind = type(result).__name__
        raise InvalidReturnError("wrong type", f"returned {kind}, not a list of {rows} numbers")
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
    not_a_number = InvalidReturnError("wrong type", f"score is {type(item).__name__}, not a number")
    if isinstance(item, (str, bytes)):
        raise not_a_number
    try:
        value = float(item)
    except OverflowError:
        raise InvalidReturnError("not finite", "score is too large for a float") from None
    except (TypeError, ValueError):
        raise not_a_number from None
    if not math.isfinite(value):
        raise InvalidReturnError("not finite", f"score is {value}")
    return value
