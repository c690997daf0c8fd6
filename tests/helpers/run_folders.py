"""A configuration, rollouts and groups for tests of the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlsloth.config import GrpoConfig
from rlsloth.records import Group, Prompt, Rollout, Score

NAMES = ["correct", "tags"]
"""Rewards of the configuration and of the rollouts."""


def config(folder: Path | None, **run: Any) -> GrpoConfig:
    """A run of three steps; ``run``: more settings of its section."""
    section = {"dir": folder, "show_samples": 0, **run}
    return GrpoConfig.model_validate({"steps": 3, "rewards": NAMES, "run": section})


def make_rollout(
    correct: float | None,
    tags: float | None,
    *,
    length: int = 3,
    finish: str = "stop",
    failure: str | None = None,
    text: str = "4",
    tools: tuple[int, int] = (0, 0),
) -> Rollout:
    """A scored rollout of ``length`` sampled tokens and one that was not; ``tools``: calls and
    failed calls."""
    scores = (
        Score("correct", correct, failure, "over budget" if failure else ""),
        Score("tags", tags),
    )
    return Rollout(
        token_ids=[1] * (length + 1),
        loss_mask=[True] * length + [False],
        logprobs=[-0.5] * (length + 1),
        policy_version=[0] * length + [-1],
        finish=finish,  # type: ignore[arg-type]
        text=text,
        messages=[{"role": "assistant", "content": text}],
        tool_calls=tools[0],
        tool_failures=tools[1],
        scores=scores,
        reward=None if failure else sum(value or 0.0 for value in (correct, tags)),
        advantages=[0.5] * length + [0.0],
    )


def make_group(
    *rollouts: Rollout,
    index: int = 0,
    messages: str | tuple[dict[str, str], ...] = "2 + 2 =",
    tools: tuple[dict[str, Any], ...] = (),
) -> Group:
    """A group with a prompt of two tokens."""
    return Group(Prompt(index, messages, {}, tools), [7, 8], list(rollouts))


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
