"""Preference rows in TRL's formats: pairs with or without a prompt column, labelled completions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlsloth.config.data import KtoDataConfig, PreferenceDataConfig
from rlsloth.config.sft import SupervisedConfig
from rlsloth.data.example import Example, make_example
from rlsloth.data.examples import Reader
from rlsloth.data.heldout import question_text
from rlsloth.data.prompts import check_text, make_prompts
from rlsloth.data.renderer import Renderer
from rlsloth.data.rows import Row
from rlsloth.data.sft import completed, completion_column, read_turns, sft_examples
from rlsloth.data.turns import Answer
from rlsloth.errors import UserError
from rlsloth.losses.preference.methods import method_of
from rlsloth.records import Prompt

SIDES = ("chosen", "rejected")


def reader(cfg: SupervisedConfig) -> Reader:
    """Choose the function that makes examples from the rows of a run's dataset."""
    method = method_of(cfg)
    return READERS[method.examples] if method else sft_examples


def pair_examples(
    rows: Sequence[Row], cfg: PreferenceDataConfig, renderer: Renderer, source: str
) -> list[Example]:
    """Make one example from each row: the chosen completion, then the rejected one.

    If ``chosen`` and ``rejected`` are whole conversations, or there is no prompt column, the prompt
    is the common beginning of both.

    Args:
        rows: the rows.
        cfg: the section ``data``.
        renderer: renders conversations to tokens.
        source: name of the dataset, for messages.

    Raises:
        UserError: a column is missing, or a row is empty or malformed, or its two completions are
            equal.
    """
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    for side in SIDES:
        if side not in columns:
            raise UserError(
                f"{source} has no column {side!r} (columns: {', '.join(columns)}): preference rows "
                "need the columns chosen and rejected, and prompt unless both contain it; rename "
                "the columns"
            )
    column = prompt_column(columns, cfg)
    split = [_split(row, column, f"{source} row {i}") for i, row in enumerate(rows, 1)]
    prompts = make_prompts(
        split, cfg, source, conversational=_conversational(split, column, source), scored=False
    )
    return [
        _pair(renderer, prompt, row, f"{source} row {prompt.index + 1}")
        for prompt, row in zip(prompts, split, strict=True)
    ]


def labelled_examples(
    rows: Sequence[Row], cfg: KtoDataConfig, renderer: Renderer, source: str
) -> list[Example]:
    """Make one example from each labelled row, or two from each row of a pair.

    Args:
        rows: the rows.
        cfg: the section ``data``.
        renderer: renders conversations to tokens.
        source: name of the dataset, for messages.

    Raises:
        UserError: a column is missing, or a row is empty or malformed or has no label.
    """
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    if "chosen" in columns and "label" not in columns:
        taken = PreferenceDataConfig(**cfg.model_dump())
        return [
            replace(pair, answers=(answer,), label=good)
            for pair in pair_examples(rows, taken, renderer, source)
            for answer, good in zip(pair.answers, (True, False), strict=True)
        ]
    if "label" not in columns:
        raise UserError(
            f"{source} has no column 'label' (columns: {', '.join(columns)}): rows need prompt, "
            "completion and label, or chosen and rejected; rename the columns"
        )
    column = completion_column(columns, cfg.completion_column, source)
    found = []
    chat = any(isinstance(row.get(column), list) for row in rows)
    prompts = make_prompts(rows, cfg, source, conversational=chat, scored=False)
    for prompt, row in zip(prompts, rows, strict=True):
        where = f"{source} row {prompt.index + 1}"
        label = row.get("label")
        if label not in (True, False):
            raise UserError(
                f"{where}, column 'label': expected true (desirable) or false, this is {label!r}"
            )
        answer = _one(completed(renderer, prompt, row.get(column), f"{where}, {column}"), where)
        found.append(make_example(prompt.index, question_text(prompt), [answer], label=bool(label)))
    return found


def _pair(renderer: Renderer, prompt: Prompt, row: Row, where: str) -> Example:
    chosen, rejected = (
        _one(completed(renderer, prompt, row[side], f"{where}, {side}"), f"{where}, {side}")
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


def _one(answers: list[Answer], where: str) -> Answer:
    """Refuse a completion of several turns that the chat template cannot render as one text."""
    if len(answers) > 1:
        raise UserError(
            f"{where}: the chat template renders earlier assistant turns differently, so the "
            "completion must be one turn; move the earlier turns to the prompt"
        )
    return answers[0]


def prompt_column(columns: Sequence[str], cfg: PreferenceDataConfig) -> str:
    """Name the column of prompts, to which a common beginning is moved if there is none."""
    known = ("prompt", "question", "problem")
    return cfg.prompt_column or next((c for c in known if c in columns), "prompt")


def _conversational(rows: Sequence[Row], column: str, source: str) -> bool:
    """Tell whether completions are messages.

    Raises:
        UserError: some rows are messages, but another is plain text.
    """
    chat = any(isinstance(row[side], list) for row in rows for side in SIDES)
    for i, row in enumerate(rows, 1):
        plain = isinstance(row["chosen"], str) and isinstance(row[column], str)
        if chat and plain and column == "prompt":
            raise UserError(
                f"{source} row {i} is plain text, but some rows are messages: convert the row to "
                "messages"
            )
    return chat


def _split(row: Row, column: str, where: str) -> Row:
    """Move a row's prompt to ``column``, if it is part of chosen and rejected."""
    has_prompt = row.get(column) is not None
    sides: list[Any] = [row.get(side) for side in SIDES]
    for side, value in zip(SIDES, sides, strict=True):
        if not isinstance(value, str | list) or not value:
            raise UserError(
                f"{where}, column {side!r}: expected text or a list of messages, this is "
                f"{'empty' if isinstance(value, str | list) else type(value).__name__}; fill it or "
                "drop the row"
            )
    texts = [isinstance(value, str) for value in sides]
    if any(texts) and not all(texts) and not has_prompt:
        raise UserError(
            f"{where}: one of chosen and rejected is text, the other one messages; make both the "
            "same"
        )
    if all(texts):
        return row if has_prompt else _split_text(row, column, sides, where)
    turns = [read_turns(v, f"{where}, {side}") for side, v in zip(SIDES, sides, strict=True)]
    if has_prompt and all(side[0]["role"] == "assistant" for side in turns):
        return row
    if {side[0]["role"] == "assistant" for side in turns} == {True, False}:
        raise UserError(
            f"{where}: only one of chosen and rejected contains the prompt; remove it there, or "
            "add it to the other one"
        )
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*turns, strict=False))
    shared = [first for first, _ in same]
    while shared and shared[-1]["role"] == "assistant":
        shared.pop()
    if not shared:
        raise UserError(
            f"{where}: chosen and rejected have no common beginning, and there is no prompt; add a "
            f"column {column}"
        )
    apart = {side: t[len(shared) :] for side, t in zip(SIDES, turns, strict=True)}
    if not all(apart.values()):
        raise UserError(f"{where}: chosen or rejected has no completion; drop the row")
    for side, own in apart.items():
        if own[0]["role"] != "assistant":
            raise UserError(
                f"{where}: chosen and rejected have different prompts: after their common "
                f"beginning, {side} continues with role {own[0]['role']!r}; make them equal, or "
                "drop the row"
            )
    return {**row, column: shared, **apart}


def _split_text(row: Row, column: str, sides: list[str], where: str) -> Row:
    """Move the common beginning of two texts to ``column``, as TRL does.

    A space at its end belongs to the completions.
    """
    check_text(sides[0], f"{where}, chosen")
    if sides[0] == sides[1]:
        raise UserError(f"{where}: chosen and rejected are equal; drop the row")
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))
    shared = sum(1 for _ in same)
    if shared and sides[0][shared - 1] == " ":
        shared -= 1
    if not shared or not all(side[shared:].strip() for side in sides):
        raise UserError(
            f"{where}: chosen and rejected have no common beginning, or one of them is nothing "
            f"else; add a column {column}"
        )
    apart = {name: side[shared:] for name, side in zip(SIDES, sides, strict=True)}
    return {**row, column: sides[0][:shared], **apart}


READERS: dict[str, Reader] = {"pairs": pair_examples, "labelled": labelled_examples}
"""Value of ``PreferenceMethod.examples`` -> the function that reads such rows."""
