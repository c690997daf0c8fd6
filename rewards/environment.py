"""The reward that the environment itself gave, summed over the turns of a rollout."""

from __future__ import annotations

from typing import Any

from rlsloth.scoring.example import Example


def environment(environment_reward: list[float | None], **_: Any) -> list[float | None]:
    """The environment's reward; None where it gives none."""
    return environment_reward


EXAMPLES = (
    Example("5", 1.0, "one turn", turn_rewards=(1.0,)),
    Example("5", 1.2, "several turns add up", turn_rewards=(0.1, 0.1, 1.0)),
    Example("5", -0.5, "a penalty", turn_rewards=(0.0, -0.5)),
    Example("5", None, "an environment that gives no rewards"),
)
