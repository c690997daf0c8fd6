"""The logging arguments of a reward: TRL's ``log_metric``, ``log_extra``, and ``log_failure``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, get_args

from rlsloth.errors import UserError
from rlsloth.scoring.protocol import Failure, FailureKind
from rlsloth.scoring.replies import MAX_METRICS, MAX_NAME


@dataclass(slots=True)
class RewardLog:
    """Metrics and columns that one call of a reward logs."""

    reward: str
    rows: int
    """Completions of the call."""
    reserved: Sequence[str]
    """Names of the trainer's own metrics, as shell patterns."""
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def metric(self, name: str, value: float) -> None:
        """Log a number under ``name``; a step's metric is its mean over the calls.

        Raises:
            UserError: the trainer logs a metric of that name.
            ValueError: the name is too long, or there are too many metrics.
        """
        if any(fnmatchcase(str(name), pattern) for pattern in self.reserved):
            raise UserError(
                f"reward {self.reward!r} calls log_metric({name!r}, ...), but the trainer logs a "
                "metric of that name: choose another name in the reward"
            )
        if len(str(name)) > MAX_NAME or len(self.metrics) >= MAX_METRICS:
            raise ValueError(
                f"log_metric takes names of up to {MAX_NAME} characters, and {MAX_METRICS} metrics "
                "a call"
            )
        self.metrics.append((str(name), float(value)))

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a column of the samples: one value, which JSON can hold, for each completion.

        Raises:
            ValueError, TypeError: another number of values, or one that JSON cannot hold.
        """
        plain = [_plain(value) for value in values]
        if len(plain) != self.rows:
            raise ValueError(
                f"log_extra({column!r}, ...) got {len(plain)} values for {self.rows} completions"
            )
        json.dumps(plain)  # raises inside the reward, where the mistake is
        self.extras[str(column)] = plain

    def failure(self, row: int, kind: FailureKind, detail: str) -> None:
        """Mark one completion's score as failed, so that it counts as no score rather than 0.

        Raises:
            ValueError: no such completion, or no such kind of failure.
        """
        if not 0 <= row < self.rows or kind not in get_args(FailureKind):
            raise ValueError(f"log_failure({row}, {kind!r}, ...) of {self.rows} completions")
        self.failures.append(Failure(row=row, kind=kind, detail=str(detail)))


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else value
