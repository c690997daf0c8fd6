"""Preference pairs from rows, with or without a column of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlsloth.config.data import ExamplesConfig, PreferenceDataConfig
from rlsloth.data.choices import Choice, Ranking, find_choice, refuse_trees
from rlsloth.data.columns import TEMPLATED, arrange, columns_of, find, find_prompt
from rlsloth.data.completions import completed, one_answer
from rlsloth.data.example import Example, make_example
from rlsloth.data.heldout import question_text
from rlsloth.data.messages import decoded
from rlsloth.data.pair_prompt import SIDES, split_pair
from rlsloth.data.prompt_reader import PromptReader, prompt_reader
from rlsloth.data.reading import Reading
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import Row
from rlsloth.errors import UserError
from rlsloth.records import Prompt

ABOUT = (
    "id", "source", "origin", "category", "subset", "split", "type", "topic", "subject", "language",
    "lang", "dataset", "license", "model", "generator", "margin", "domain", "task", "difficulty",
)  # fmt: skip
"""Columns that describe a pair: no prompt is looked for in them, nor in names that end with one of
these after an underscore, or begin with one before it."""


def pair_examples(
    rows: Sequence[Row],
    cfg: PreferenceDataConfig,
    renderer: Renderer,
    source: str,
    reading: Reading | None = None,
) -> list[Example]:
    """Make one example from each row: the chosen completion, then the rejected one.

    If ``chosen`` and ``rejected`` are whole conversations, or there is no prompt column, the prompt
    is the common beginning of both.

    Args:
        rows: the rows.
        cfg: the section ``data``.
        renderer: renders conversations to tokens.
        source: name of the dataset, for messages.
        reading: decides about bad rows, and collects what a run says about the data.

    Raises:
        UserError: a column is missing, or a row is empty or malformed, or its two completions are
            equal.
    """
    reading = reading or Reading.of(cfg)
    rows = arrange(rows, cfg, source)
    columns = columns_of(rows)
    choice = None if find("chosen", columns) else find_choice(rows, columns)
    if choice is None:
        names = [_side(side, columns, source) for side in SIDES]
        rows = [_with_sides(row, names) for row in rows]
    else:
        names = [*choice.columns]
    column = prompt_column([c for c in columns if c not in names], cfg, choice)
    chat = any(isinstance(row.get(side), list) for row in rows for side in SIDES)
    if column not in columns:
        _refuse_texts(rows, [c for c in columns if c not in names], source)
    made = prompt_reader(
        rows, cfg, source, column=column, taken=(*names, *SIDES), conversational=chat
    )
    _note_pair(reading, made, names, rows, columns)

    def read(index: int, row: Row) -> Example:
        where = f"{source} row {index + 1}"
        if choice is not None:
            chosen, rejected = choice.sides(row, where)
            row = {**row, "chosen": chosen, "rejected": rejected}
        split = split_pair(row, column, where, reading.keys)
        _refuse_mixture(split, column, chat, where)
        prompt = made.read(index, split, where, reading)
        return _pair(renderer, prompt, split, where)

    return list(reading.each(rows, source, read))


def _note_pair(
    reading: Reading,
    made: PromptReader,
    names: Sequence[str],
    rows: Sequence[Row],
    columns: Sequence[str],
) -> None:
    """Note the columns that pairs are made of."""
    if made.column in columns:
        reading.use(made.column, made.context)
    reading.use(made.system)
    reading.use(made.tools)
    for name in names:
        reading.use(name)
    reading.use("chat_template_kwargs", hidden=True)
    reading.leave(c for c in columns_of(rows, filled=True) if c not in SIDES)


def _side(side: str, columns: Sequence[str], source: str) -> str:
    """Name the column of the chosen or the rejected completion."""
    found = find(side, columns)
    if found is None:
        refuse_trees(columns, source)
        raise UserError(
            f"{source} has no column {side!r} (columns: {', '.join(columns)}): preference rows "
            "need the columns chosen and rejected, and prompt unless both contain it; name yours "
            f"with --data.columns.{side} COLUMN"
        )
    return found


def _with_sides(row: Row, names: Sequence[str]) -> Row:
    """Put the two completions under the names chosen and rejected, as text or a list."""
    values = [decoded(row.get(name)) for name in names]
    values = [[v] if isinstance(v, Mapping) else v for v in values]
    values = [list(v) if isinstance(v, tuple) else v for v in values]
    return {**row, **dict(zip(SIDES, values, strict=True))}


def prompt_column(
    columns: Sequence[str], cfg: ExamplesConfig, choice: Choice | Ranking | None = None
) -> str:
    """Name the column of prompts, to which a common beginning is moved if there is none."""
    if cfg.prompt_template is not None:
        return TEMPLATED
    if choice is not None:
        return cfg.prompt_column or choice.prompt
    found = cfg.prompt_column or find_prompt(columns)
    return found or find("messages", columns) or "prompt"


def _refuse_texts(rows: Sequence[Row], columns: Sequence[str], source: str) -> None:
    """Refuse plain texts without a prompt, if another column of text may be it.

    The common beginning of two answers ("The answer is") would be taken for the prompt.
    """
    if not all(isinstance(row[side], str) for row in rows for side in SIDES):
        return
    texts = [c for c in columns if not _describes(c) and any(_is_words(r.get(c)) for r in rows)]
    if texts:
        raise UserError(
            f"{source} has no column of prompts under a known name, but other columns of text: "
            f"{', '.join(texts)}; name the prompt's with --data.prompt-column {texts[0]}, or leave "
            f"them out with --data.drop-columns {' '.join(texts)} if chosen and rejected contain "
            "the prompt"
        )


def _describes(column: str) -> bool:
    parts = column.lower().split("_")
    return parts[0] in ABOUT or parts[-1] in (*ABOUT, "name", "hash", "uuid")


def _is_words(value: Any) -> bool:
    return isinstance(value, str) and " " in value.strip()


def _refuse_mixture(row: Row, column: str, chat: bool, where: str) -> None:
    """Refuse a row of plain text if other rows are messages."""
    plain = isinstance(row["chosen"], str) and isinstance(row.get(column), str)
    if chat and plain and column == "prompt":
        raise UserError(
            f"{where} is plain text, but some rows are messages: convert the row to messages"
        )


def _pair(renderer: Renderer, prompt: Prompt, row: Row, where: str) -> Example:
    kwargs = row.get("chat_template_kwargs")
    chosen, rejected = (
        one_answer(
            completed(renderer, prompt, row[side], f"{where}, {side}", kwargs), f"{where}, {side}"
        )
        for side in SIDES
    )
    if chosen.prompt_ids != rejected.prompt_ids:
        raise UserError(
            f"{where}: the chat template renders different prompts for chosen and rejected; give "
            "both the same prompt, or drop the row"
        )
    if chosen.token_ids == rejected.token_ids:
        raise UserError(f"{where}: chosen and rejected are equal; drop the row")
    return make_example(prompt.index, question_text(prompt), [chosen, rejected])
