"""Labelled completions from rows, for KTO: each is marked as desirable or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig
from rlsloth.data.choices import find_choice, refuse_trees
from rlsloth.data.columns import arrange, columns_of, find, find_prompt
from rlsloth.data.completions import Completions, one_answer, read_turns
from rlsloth.data.example import Example, make_example
from rlsloth.data.heldout import question_text
from rlsloth.data.pairs import pair_examples
from rlsloth.data.prompt_reader import prompt_reader
from rlsloth.data.reading import Reading
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import Row
from rlsloth.data.sft import completion_column
from rlsloth.errors import UserError


def labelled_examples(
    rows: Sequence[Row],
    cfg: KtoDataConfig,
    renderer: Renderer,
    source: str,
    reading: Reading | None = None,
) -> list[Example]:
    """Make one example from each labelled row, or two from each row of a pair.

    Args:
        rows: the rows.
        cfg: the section ``data``.
        renderer: renders conversations to tokens.
        source: name of the dataset, for messages.
        reading: decides about bad rows, and collects what a run says about the data.

    Raises:
        UserError: a column is missing, or a row is empty or malformed or has no label.
    """
    reading = reading or Reading.of(cfg)
    columns = columns_of(arrange(rows, cfg, source))
    marks = find("label", columns)
    is_pair = find("chosen", columns) is not None or find_choice(rows, columns) is not None
    if marks is None and is_pair:
        taken = PreferenceDataConfig(**cfg.model_dump())
        return [
            replace(pair, answers=(answer,), label=good)
            for pair in pair_examples(rows, taken, renderer, source, reading)
            for answer, good in zip(pair.answers, (True, False), strict=True)
        ]
    rows = arrange(rows, cfg, source)
    if marks is None:
        refuse_trees(columns, source)
        raise UserError(
            f"{source} has no column 'label' (columns: {', '.join(columns)}): rows need prompt, "
            "completion and label, or chosen and rejected; name yours with --data.columns.label "
            "COLUMN"
        )
    free = [column for column in columns if column != marks]
    prompt = cfg.prompt_column or find_prompt(free)
    whole = None if cfg.completion_column or prompt else find("messages", free)
    made = _labelled(rows, free, cfg, renderer, source, reading, prompt, whole)
    if whole is None:
        made.note(reading)
    reading.use(whole)
    reading.use(marks)
    reading.leave(columns_of(rows, filled=True))

    def read(index: int, row: Row) -> Example:
        where = f"{source} row {index + 1}"
        good = _label(row.get(marks), f"{where}, column {marks!r}")
        if whole is not None:
            row = _apart(row, whole, f"{where}, column {whole!r}")
        question, answers = made.read(index, row, where)
        answer = one_answer(answers, where)
        return make_example(index, question_text(question), [answer], label=good)

    return list(reading.each(rows, source, read))


def _labelled(
    rows: Sequence[Row],
    columns: list[str],
    cfg: KtoDataConfig,
    renderer: Renderer,
    source: str,
    reading: Reading,
    prompt: str | None,
    whole: str | None,
) -> Completions:
    """Find the columns of labelled completions; ``whole`` is one of conversations, to be taken
    apart. Raises UserError."""
    if whole is not None:
        made = prompt_reader(rows, cfg, source, column="prompt", conversational=True)
        return Completions(made, "completion", None, renderer, reading)
    completion = completion_column(columns, cfg, prompt, source)
    made = prompt_reader(
        rows,
        cfg,
        source,
        column=None if cfg.prompt_template else prompt,
        taken=(completion, "label"),
        conversational=Completions.is_chat(rows, completion),
    )
    return Completions(made, completion, None, renderer, reading)


def _apart(row: Row, column: str, where: str) -> Row:
    """Take a conversation apart: the turns after the last one of the user are the completion."""
    turns = read_turns(row.get(column), where, texts=True)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    return {**row, "prompt": turns[: last + 1], "completion": turns[last + 1 :]}


def _label(value: Any, where: str) -> bool:
    """Read a label. Raises UserError."""
    words = {"true": True, "false": False, "1": True, "0": False}
    found = words.get(value.strip().lower()) if isinstance(value, str) else value
    if found not in (True, False):
        raise UserError(f"{where}: expected true (desirable) or false, this is {value!r}")
    return bool(found)
