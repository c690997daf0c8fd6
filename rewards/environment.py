"""The reward that the environment itself gave, summed over the turns of a rollout."""

from __future__ import annotations

from typing import Any


def environment(environment_reward: list[float | None], **columns: Any) -> list[float | None]:
    """The environment's reward; None where it gives none."""
    return environment_reward
