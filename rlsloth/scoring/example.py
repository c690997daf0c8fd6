"""Worked examples that a reward module ships as ``EXAMPLES``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlsloth.records import FinishReason


@dataclass(frozen=True, slots=True)
class Example:
    """One completion, and the score that the reward with its default parameters must give it."""

    completion: str
    expected: float | None
    """None: the reward does not apply."""
    note: str
    """The point of the example in a few words."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's dataset columns."""
    completion_ids: tuple[int, ...] = ()
    """Token ids, for rewards that count tokens."""
    finish: FinishReason = "stop"
    turn_rewards: tuple[float, ...] = ()
    """The environment's rewards, one for each assistant turn."""
