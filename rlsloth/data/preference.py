"""Rows of preferences, in TRL's formats: pairs with the prompt apart or within, and labelled
completions."""

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
    """The function that reads the rows of a command's data into examples."""
    method = method_of(cfg)
    return READERS[method.examples] if method else sft_examples


def pair_examples(
    rows: Sequence[Row], cfg: PreferenceDataConfig, renderer: Renderer, source: str
) -> list[Example]:
    """One pair a row, chosen before rejected, in the rows' order.

    Where ``chosen`` and ``rejected`` are whole conversations, or there is no prompt column, the
    prompt is what both begin with.

    Raises:
        UserError: no such columns, or a row that is empty or malformed, or prefers nothing: its
            chosen answer equals the rejected one.
    """
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    for side in SIDES:
        if side not in columns:
            raise UserError(
                f"{source} has no column {side!r} (columns: {', '.join(columns)}): a preference "
                "row has chosen and rejected, and prompt unless both contain it"
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
    """One labelled completion a row, or two a row of pairs.

    Raises:
        UserError: no such columns, or a row that is empty or malformed or has no label.
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
            f"{source} has no column 'label' (columns: {', '.join(columns)}): a row has prompt, "
            "completion and label, or chosen and rejected"
        )
    column = completion_column(columns, cfg.completion_column, source)
    found = []
    chat = any(isinstance(row.get(column), list) for row in rows)
    prompts = make_prompts(rows, cfg, source, conversational=chat, scored=False)
    for prompt, row in zip(prompts, rows, strict=True):
        where = f"{source} row {prompt.index + 1}"
        label = row.get("label")
        if label not in (True, False):
            raise UserError(f"{where}, column 'label': true (good) or false, this is {label!r}")
        answer = _one(completed(renderer, prompt, row.get(column), f"{where}, {column}"), where)
        found.append(make_example(prompt.index, question_text(prompt), [answer], label=bool(label)))
    return found


def _pair(renderer: Renderer, prompt: Prompt, row: Row, where: str) -> Example:
    chosen, rejected = (
        _one(completed(renderer, prompt, row[side], f"{where}, {side}"), f"{where}, {side}")
        for side in SIDES
    )
    if chosen.prompt_ids != rejected.prompt_ids:
        raise UserError(f"{where}: chosen and rejected are shown after different prompts")
    if chosen.token_ids == rejected.token_ids:
        raise UserError(f"{where}: the chosen answer equals the rejected one; drop the row")
    return make_example(prompt.index, question_text(prompt), [chosen, rejected])


def _one(answers: list[Answer], where: str) -> Answer:
    """Several turns whose prompts the template shows differently are no one completion."""
    if len(answers) > 1:
        raise UserError(
            f"{where}: the chat template shows an assistant turn otherwise once it is past, so the "
            "answer must be one turn; move the earlier ones to the prompt"
        )
    return answers[0]


def prompt_column(columns: Sequence[str], cfg: PreferenceDataConfig) -> str:
    """Where prompts stand, or are put if both sides contain them."""
    known = ("prompt", "question", "problem")
    return cfg.prompt_column or next((c for c in known if c in columns), "prompt")


def _conversational(rows: Sequence[Row], column: str, source: str) -> bool:
    """Whether answers are messages. Raises UserError where some are plain text after plain text."""
    chat = any(isinstance(row[side], list) for row in rows for side in SIDES)
    for i, row in enumerate(rows, 1):
        plain = isinstance(row["chosen"], str) and isinstance(row[column], str)
        if chat and plain and column == "prompt":
            raise UserError(f"{source} row {i} is plain text, other rows are messages: make it one")
    return chat


def _split(row: Row, column: str, where: str) -> Row:
    """The row with its prompt apart, in ``column``."""
    has_prompt = row.get(column) is not None
    sides: list[Any] = [row.get(side) for side in SIDES]
    for side, value in zip(SIDES, sides, strict=True):
        if not isinstance(value, str | list) or not value:
            raise UserError(f"{where}, column {side!r}: expected text or a list of messages")
    texts = [isinstance(value, str) for value in sides]
    if any(texts) and not all(texts) and not has_prompt:
        raise UserError(f"{where}: chosen and rejected are of two kinds, text and messages")
    if all(texts):
        return row if has_prompt else _split_text(row, column, sides, where)
    turns = [read_turns(v, f"{where}, {side}") for side, v in zip(SIDES, sides, strict=True)]
    if has_prompt and all(side[0]["role"] == "assistant" for side in turns):
        return row
    if {side[0]["role"] == "assistant" for side in turns} == {True, False}:
        raise UserError(f"{where}: one of chosen and rejected holds the prompt, the other does not")
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*turns, strict=False))
    shared = [first for first, _ in same]
    while shared and shared[-1]["role"] == "assistant":
        shared.pop()
    if not shared:
        raise UserError(f"{where}: chosen and rejected share no prompt, and there is no prompt")
    apart = {side: t[len(shared) :] for side, t in zip(SIDES, turns, strict=True)}
    if not all(apart.values()):
        raise UserError(f"{where}: the chosen answer equals the rejected one; drop the row")
    for side, own in apart.items():
        if own[0]["role"] != "assistant":
            raise UserError(f"{where}: chosen and rejected answer different prompts ({side})")
    return {**row, column: shared, **apart}


def _split_text(row: Row, column: str, sides: list[str], where: str) -> Row:
    """As TRL: what both begin with, up to a space, which belongs to the answers."""
    check_text(sides[0], f"{where}, chosen")
    if sides[0] == sides[1]:
        raise UserError(f"{where}: the chosen answer equals the rejected one; drop the row")
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))
    shared = sum(1 for _ in same)
    if shared and sides[0][shared - 1] == " ":
        shared -= 1
    if not shared or not all(side[shared:].strip() for side in sides):
        raise UserError(
            f"{where}: chosen and rejected share no prompt or one is all of it; add a column prompt"
        )
    apart = {name: side[shared:] for name, side in zip(SIDES, sides, strict=True)}
    return {**row, column: sides[0][:shared], **apart}


READERS: dict[str, Reader] = {"pairs": pair_examples, "labelled": labelled_examples}
"""``PreferenceMethod.examples`` to the reader of such rows."""
