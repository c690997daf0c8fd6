"""The worked examples that a reward module ships as ``EXAMPLES``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlsloth.records import FinishReason


@dataclass(frozen=True, slots=True)
class Example:
    """One completion and the score the reward must give it with its default parameters."""

    completion: str
    expected: float | None
    """None: the reward does not apply."""
    note: str
    """What the example shows, in a few words."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's dataset columns."""
    completion_ids: tuple[int, ...] = ()
    """Token ids, for rewards that count tokens."""
    finish: FinishReason = "stop"
    turn_rewards: tuple[float, ...] = ()
    """Rewards that the environment gave, one an assistant turn."""
