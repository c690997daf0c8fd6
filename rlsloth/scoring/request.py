"""The call that a worker gets for a group, checked against the reward's signature."""

from __future__ import annotations

import json
from typing import Any

from rlsloth.errors import UserError, nearest
from rlsloth.records import Group, Prompt
from rlsloth.scoring.protocol import Call, RewardInfo

RESERVED = (
    "prompts",
    "completions",
    "completion_ids",
    "finish_reasons",
    "environment_reward",
    "trainer_state",
    "log_extra",
    "log_metric",
    "log_failure",
)
"""Arguments that do not come from the row's columns."""


def accepted_columns(prompt: Prompt, name: str, info: RewardInfo) -> dict[str, Any]:
    """Return the prompt's columns with which the reward ``name`` is called.

    Raises:
        UserError: a column is missing, has the name of an argument, or cannot be written as JSON.
    """
    columns = prompt.columns
    row = prompt.index + 1
    for column in columns:
        if column in RESERVED:
            raise UserError(
                f"the dataset's column {column!r} has the name of a reward argument: rename it, or "
                f"leave it out with --env.drop-columns {column}"
            )
        if column in info["parameters"]:
            raise UserError(
                f"the dataset's column {column!r} has the name of a parameter of reward {name!r}: "
                f"rename the column, or set reward.params.{name}.{column}"
            )
    missing = [key for key in info["required"] if key not in columns and key not in RESERVED]
    if missing:
        raise UserError(
            f"reward {name!r} needs a column {missing[0]!r}{nearest(missing[0], list(columns))} "
            f"(row {row} has: {', '.join(sorted(columns)) or 'none'}): add it to the dataset as "
            f"text, numbers or lists, or name its column with --env.columns.{missing[0]} COLUMN"
        )
    accepts = info["accepts"]
    accepted = {k: v for k, v in columns.items() if accepts is None or k in accepts}
    for column, value in accepted.items():
        _check_json(f"row {row}, column {column!r}", value, name)
    return accepted


def group_call(group: Group, reward: int, name: str, info: RewardInfo, step: int) -> Call:
    """Make the call for a whole group, with the columns that the reward accepts.

    Raises:
        UserError: see ``accepted_columns``.
    """
    columns = accepted_columns(group.prompt, name, info)
    messages = group.prompt.messages
    wants_ids = info["accepts"] is None or "completion_ids" in info["accepts"]
    return Call(
        call=0,
        reward=reward,
        step=step,
        cpu_seconds=0.0,
        prompt=messages,
        completions=[r.text if isinstance(messages, str) else r.messages for r in group.rollouts],
        completion_ids=[r.token_ids if wants_ids else [] for r in group.rollouts],
        finish_reasons=[r.finish for r in group.rollouts],
        environment_reward=[r.environment_reward for r in group.rollouts],
        columns=columns,
    )


def _check_json(where: str, value: Any, name: str) -> None:
    try:
        json.dumps(value)
        key = _odd_key(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where} cannot be passed to reward {name!r} as JSON ({error}): "
            "remove the column, or name the wanted columns in the reward instead of **kwargs"
        ) from None
    if key is not None:
        raise UserError(
            f"{where} has a dict with the key {key!r}, but keys in JSON are strings: make it one"
        )


def _odd_key(value: Any) -> Any:
    """Find a dict key that is not a string, which JSON would silently turn into one; or None."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return key
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return next((key for item in value if (key := _odd_key(item)) is not None), None)
    return None
