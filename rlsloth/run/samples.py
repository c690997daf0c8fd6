"""Samples of a step as a parquet file with TRL's columns: step, prompt, completion, one column a
reward, advantage.

More columns follow: ``weighted_reward``, ``overlong_penalty`` (if one is configured), ``finish``,
``tokens`` (sampled), ``prompt_index``, ``failure``, and the columns that rewards logged with
``log_extra``.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlsloth.files import write_atomically
from rlsloth.records import Group, Message, Rollout

_BEFORE = (("step", pa.int64()), ("prompt", pa.large_string()), ("completion", pa.large_string()))
_AFTER = (
    ("advantage", pa.float64()),
    ("weighted_reward", pa.float64()),
    ("overlong_penalty", pa.float64()),
    ("finish", pa.string()),
    ("tokens", pa.int64()),
    ("prompt_index", pa.int64()),
    ("failure", pa.large_string()),
)
FIXED_COLUMNS = tuple(name for name, _ in _BEFORE + _AFTER)
"""Columns of every file; the others are rewards, or logged by rewards."""
EXTRA = {b"rlsloth": b"log_extra"}
"""Metadata of a column that a reward logged."""


def write_samples(
    path: Path, step: int, groups: Sequence[Group], reward_names: Sequence[str]
) -> None:
    """Write all rollouts of a step, one a row, atomically.

    A reward that does not apply or failed is null. ``failure`` describes the failures of a rollout,
    and is empty without any. A reward named like a fixed column is in ``rewards/<name>``, and a
    logged column named like any other column in ``extra/<name>``. Chat turns are joined in one
    text.

    Raises:
        OSError: the file could not be written; an old one stays.
    """
    rows = [(group, rollout) for group in groups for rollout in group.rollouts]
    columns: dict[str, list[Any]] = {
        "step": [step] * len(rows),
        "prompt": [clean(as_text(group.prompt.messages)) for group, _ in rows],
        "completion": [clean(completion_text(rollout)) for _, rollout in rows],
    }
    reward_columns = [column_of(name) for name in reward_names]
    for index, column in enumerate(reward_columns):
        columns[column] = [rollout.scores[index].value for _, rollout in rows]
    columns |= {
        "advantage": [mean_advantage(rollout) for _, rollout in rows],
        "weighted_reward": [rollout.reward for _, rollout in rows],
        "overlong_penalty": [rollout.overlong_penalty for _, rollout in rows],
        "finish": [rollout.finish for _, rollout in rows],
        "tokens": [rollout.length for _, rollout in rows],
        "prompt_index": [group.prompt.index for group, _ in rows],
        "failure": [clean(failure_text(rollout)) for _, rollout in rows],
    }
    fields = [pa.field(*column) for column in _BEFORE]
    fields += [pa.field(column, pa.float64()) for column in reward_columns]
    fields += [pa.field(*column) for column in _AFTER]
    extras = _extras([rollout for _, rollout in rows], columns)
    for name, array in extras.items():
        fields.append(pa.field(name, array.type, metadata=EXTRA))
    table = pa.table(columns | extras, schema=pa.schema(fields))
    if all(rollout.overlong_penalty is None for _, rollout in rows):
        table = table.drop_columns("overlong_penalty")
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, buffer.getvalue().to_pybytes())


def column_of(reward_name: str) -> str:
    """Name of a reward's column."""
    return f"rewards/{reward_name}" if reward_name in FIXED_COLUMNS else reward_name


def _extras(rollouts: Sequence[Rollout], taken: Container[str]) -> dict[str, pa.Array]:
    """Columns that rewards logged, in the order of their first value."""
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.extras)
    return {
        f"extra/{name}" if name in taken else name: _array([r.extras.get(name) for r in rollouts])
        for name in names
    }


def _array(values: Sequence[Any]) -> pa.Array:
    """Logged values as numbers, booleans or text; values of mixed or other types as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    for types, arrow in (({bool}, pa.bool_()), ({int}, pa.int64()), ({int, float}, pa.float64())):
        if kinds and kinds <= types:
            with contextlib.suppress(OverflowError, pa.ArrowInvalid):  # beyond 64 bits: as text
                return pa.array(values, arrow)
    if not kinds <= {str}:
        values = [None if value is None else json.dumps(value) for value in values]
    return pa.array([v if v is None else clean(v) for v in values], pa.large_string())


def as_text(messages: str | Sequence[Message]) -> str:
    """A prompt or conversation as one text: the content of a single message; of several, each under
    its role."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1:
        return _content(messages[0])
    return "\n\n".join(f"[{message.get('role')}]\n{_content(message)}" for message in messages)


def _content(message: Message) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else json.dumps(content, default=str)
    calls = message.get("tool_calls")
    if not calls:
        return text
    return f"{text}\n{json.dumps(calls, default=str)}".strip()


def completion_text(rollout: Rollout) -> str:
    """The text after the prompt: the completion, or all turns if there were several."""
    return as_text(rollout.messages) if len(rollout.messages) > 1 else rollout.text


def mean_advantage(rollout: Rollout) -> float:
    """Mean advantage of the sampled tokens; 0 without any."""
    pairs = zip(rollout.advantages, rollout.loss_mask, strict=False)
    values = [advantage for advantage, sampled in pairs if sampled]
    if not values or min(values) == max(values):
        return values[0] if values else 0.0  # exactly: a mean of equal numbers may round
    return statistics.fmean(values)


def failure_text(rollout: Rollout) -> str:
    """Description of the failed rewards of a rollout; empty when none failed."""
    return "\n".join(
        f"{score.name}: {score.failure} {score.detail}".rstrip()
        for score in rollout.scores
        if score.failure is not None
    )


def clean(text: str) -> str:
    """Text that UTF-8 can encode: lone surrogates, which a tokenizer or a dataset may produce, are
    written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
