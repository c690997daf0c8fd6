"""An end for rewards that only fail: a run without any score learns nothing."""

from __future__ import annotations

import threading
from collections import Counter

from rlsloth.errors import UserError
from rlsloth.scoring.report import ScoringReport

MAX_HANGS = 5
"""Calls of one completion in a row without a result, after which a reward is given up."""
MAX_ROUNDS = 3
"""Steps in a row in which a reward failed on every completion, after which the run ends."""


class Hangs:
    """Counts calls in a row that gave no result; several threads may use it."""

    def __init__(self, wall_seconds: float) -> None:
        self._wall_seconds = wall_seconds
        self._in_a_row: Counter[str] = Counter()
        self._lock = threading.Lock()

    def check(self, reward: str) -> None:
        """Raise UserError once a reward has hung too often."""
        if self._in_a_row[reward] >= MAX_HANGS:
            raise UserError(
                f"reward {reward!r} gave no result within --reward.wall-seconds "
                f"{self._wall_seconds:g} in {MAX_HANGS} calls in a row: does it wait for a server "
                "that is down? Mend it, or raise --reward.wall-seconds"
            )

    def count(self, reward: str, *, hung: bool) -> None:
        """Count a call of one completion that hung, or any call with a result.

        Raises:
            UserError: it was one too many.
        """
        with self._lock:
            self._in_a_row[reward] = self._in_a_row[reward] + 1 if hung else 0
        self.check(reward)


class FailedRounds:
    """Counts steps in a row in which a reward failed on every completion."""

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()

    def check(self, report: ScoringReport) -> None:
        """Count a step. Raises UserError after ``MAX_ROUNDS`` of them."""
        for reward in report.rewards:
            failed = sum(reward.failures.values())
            if not failed or reward.scored or reward.not_applicable:
                self._in_a_row[reward.name] = 0
                continue
            self._in_a_row[reward.name] += 1
            if self._in_a_row[reward.name] < MAX_ROUNDS:
                continue
            first = next((d for d in report.details if d.reward == reward.name), None)
            example = f" ({first.kind}: {first.detail})" if first else ""
            raise UserError(
                f"reward {reward.name!r} failed on every completion of {MAX_ROUNDS} steps in a "
                f"row{example}: mend it, or leave it out of --rewards; `rlsloth rewards test` "
                "calls it alone"
            )
