"""Prompts from rows in TRL's dataset formats, and in others that datasets have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rlsloth.config import DatasetConfig
from rlsloth.data.columns import NAMES, TEMPLATED, arrange, columns_of, find, value_at
from rlsloth.data.heldout import split_heldout
from rlsloth.data.json_values import UnsendableError, as_json
from rlsloth.data.prompt_reader import prompt_reader
from rlsloth.data.reading import Reading
from rlsloth.data.rows import Row, load_rows
from rlsloth.errors import UserError
from rlsloth.records import Prompt

NOT_PASSED = ("prompt", "completion", "completion_ids", TEMPLATED)
"""Columns that TRL's trainers do not pass on to rewards."""


def make_prompts(
    rows: Sequence[Row],
    cfg: DatasetConfig,
    source: str,
    tools: Sequence[Any] = (),
    conversational: bool = False,
    reading: Reading | None = None,
    gold: bool = False,
) -> list[Prompt]:
    """Make one prompt of each row, in the rows' order.

    A string in the column ``prompt`` is continued unchanged (TRL's standard format); a string in
    any other column, or any string when there is a system message, is one user message. The
    configuration's system prompt replaces a row's own. Of whole conversations the last assistant
    turn is left out. A row's own ``tools`` follow those given. Columns but NOT_PASSED are kept for
    rewards, None where a row lacks one; those that JSON cannot hold are left out.

    Args:
        rows: the rows.
        cfg: the section of the dataset.
        source: name of the dataset, for messages.
        tools: JSON schemas offered with every prompt.
        conversational: make strings in the column ``prompt`` user messages too.
        reading: decides about bad rows, and collects what a run says about the data.
        gold: pass the column of gold answers as ``answer``, if it has another name.

    Raises:
        UserError: the prompt column is missing, or a row's prompt is empty or malformed.
    """
    reading = reading or Reading.of(cfg)
    rows = arrange(rows, cfg, source)
    columns = columns_of(rows)
    reader = prompt_reader(rows, cfg, source, conversational=conversational, tools=tools)
    _refuse_arguments(columns, cfg, source)
    place = _gold(columns, rows) if gold else None
    passed = [c for c in columns if c not in NOT_PASSED]
    left_out: dict[str, None] = {}

    def read(index: int, row: Row) -> Prompt:
        where = f"{source} row {index + 1}"
        own = reader
        if row.get(reader.column) is None and cfg.prompt_column is None:
            filled = [c for c, v in row.items() if v is not None]
            other = find("task", filled)
            own = replace(reader, column=other, chat=True) if other else reader
        prompt = own.read(index, row, where, reading)
        values = {c: row.get(c) for c in passed if c not in left_out}
        if place is not None:
            values["answer"] = value_at(row, place)
        return replace(prompt, columns=_sendable(values, left_out, where))

    reader.note(reading)
    if place is not None:
        reading.remarks[f"gold answers, passed to rewards as answer: column {place}"] = None
    made = list(reading.each(rows, source, read))
    reading.unused |= left_out
    return [_without(prompt, left_out) for prompt in made] if left_out else made


def _without(prompt: Prompt, left_out: dict[str, None]) -> Prompt:
    """Drop columns of a prompt."""
    return replace(prompt, columns={c: v for c, v in prompt.columns.items() if c not in left_out})


def _sendable(values: Row, left_out: dict[str, None], where: str) -> Row:
    """Convert a row's columns to JSON, and add those that it cannot hold to ``left_out``."""
    found = {}
    for column, value in values.items():
        try:
            found[column] = as_json(value, f"{where}, column {column!r}")
        except UnsendableError:
            left_out[column] = None
    return found


def _refuse_arguments(columns: Sequence[str], cfg: DatasetConfig, source: str) -> None:
    """Refuse columns with the names of arguments of every reward."""
    for name in ("prompts", "completions"):
        if name in columns:
            raise UserError(
                f"{source}: rewards are called with {name!r}; rename that column, or leave it out "
                f"with --{cfg.SECTION}.drop-columns {name}"
            )


def _gold(columns: Sequence[str], rows: Sequence[Row]) -> str | None:
    """Name the column of gold answers, unless rewards find one under the names they know."""
    if find("gold", columns) is None or {"answer", "solution"} & set(columns):
        return None
    places = (name for name in NAMES["gold"] if any(value_at(r, name) is not None for r in rows))
    return next(places, None)


def load_prompts(
    cfg: DatasetConfig,
    seed: int,
    make: Callable[[list[Row], str], list[Prompt]],
    reading: Reading | None = None,
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of the data that ``cfg.train`` and ``cfg.validation`` name.

    Args:
        cfg: the section of the dataset.
        seed: seed of the split.
        make: prompts of rows, given what to call the rows in errors.
        reading: decides about malformed lines. Default: they are refused.
    """
    train = make(load_rows(cfg.train, cfg.train_split, cfg.limit, reading), cfg.train)
    if cfg.validation is None:
        return split_heldout(train, cfg.heldout, seed, cfg.SECTION)
    held = load_rows(cfg.validation, cfg.validation_split, bad=reading)
    return train, make(held, cfg.validation)
