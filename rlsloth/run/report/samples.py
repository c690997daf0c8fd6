"""Samples in a report: an evenly spaced part of them, since the page has to open on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rlsloth.errors import first_line
from rlsloth.run.folder import sample_files
from rlsloth.run.samples import EXTRA, FIXED_COLUMNS

MAX_STEPS = 60
"""Steps with samples."""
MAX_ROWS = 8
"""Samples a step."""
MAX_CHARACTERS = 4000
"""Characters of a prompt or a completion. The middle of a longer text is left out, since the answer
tends to be at the end."""


def embedded_samples(folder: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """Samples for the page's script: evenly spaced steps and rows, whatever their rewards.

    ``warn`` is called for each file that cannot be read.

    Returns:
        ``steps_total``, ``max_steps``, ``max_rows`` and ``steps``: step, total, reward names and
        rows.
    """
    paths = list(sample_files(folder).items())
    chosen = [paths[index] for index in evenly(len(paths), MAX_STEPS)]
    return {
        "steps_total": len(paths),
        "max_steps": MAX_STEPS,
        "max_rows": MAX_ROWS,
        "steps": [found for step, path in chosen if (found := _step(step, path, warn))],
    }


def evenly(count: int, limit: int) -> list[int]:
    """At most ``limit`` evenly spaced indices below ``count``, including the first and the last."""
    if count <= limit:
        return list(range(count))
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def _step(step: int, path: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Samples of one step; None for a damaged file."""
    try:
        with open(path, "rb") as file:
            table = pq.read_table(file)
        extras = [column.name for column in table.schema if column.metadata == EXTRA]
        names = [name for name in table.column_names if name not in (*FIXED_COLUMNS, *extras)]
        rows = table.take(evenly(table.num_rows, MAX_ROWS)).to_pylist()
        return {
            "step": step,
            "total": table.num_rows,
            "rewards": names,
            "rows": [_row(row, names, extras) for row in rows],
        }
    except Exception as error:  # a flipped byte can raise anything, in pyarrow or here
        warn(f"{path} is damaged and left out of the report ({first_line(error)})")
        return None


def _row(row: dict[str, Any], names: Sequence[str], extras: Sequence[str]) -> dict[str, Any]:
    return {
        "prompt": _cut(row["prompt"]),
        "completion": _cut(row["completion"]),
        "scores": [row[name] for name in names],
        "reward": row["weighted_reward"],
        "advantage": row["advantage"],
        "finish": row["finish"],
        "tokens": row["tokens"],
        "index": row["prompt_index"],
        "failure": _cut(row["failure"]),
        "extras": [f"{name}: {_cut(str(row[name]))}" for name in extras if row[name] is not None],
    }


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    head, tail = MAX_CHARACTERS * 2 // 3, MAX_CHARACTERS // 3
    return (
        f"{text[:head]}\n\n[… {len(text) - head - tail:,} characters left out …]\n\n{text[-tail:]}"
    )
