"""The prompt of a preference pair: apart, or the common beginning of both completions."""

from __future__ import annotations

import itertools
from typing import Any

from rlsloth.data.completions import read_turns
from rlsloth.data.rows import Row
from rlsloth.data.text import check_text
from rlsloth.errors import UserError

SIDES = ("chosen", "rejected")


def split_pair(row: Row, column: str, where: str, keys: dict[str, None]) -> Row:
    """Move a row's prompt to ``column``, if it is part of chosen and rejected.

    Args:
        row: the row.
        column: column of prompts.
        where: place of the row, for messages.
        keys: unknown keys of messages are added here.

    Raises:
        UserError: the two completions are malformed, equal, or have different prompts.
    """
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
    turns = [read_turns(v, f"{where}, {side}", keys) for side, v in zip(SIDES, sides, strict=True)]
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
