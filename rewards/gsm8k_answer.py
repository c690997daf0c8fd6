"""Exact numeric answers to GSM8K and datasets like it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from rlsloth.scoring.answers import (
    after_hashes,
    completion_text,
    exact_number,
    last_boxed,
    marked_answer,
    numbers_in,
)
from rlsloth.scoring.example import Example


def gsm8k_answer(
    completions: list[Any],
    answer: list[Any],
    finish_reasons: list[str],
    *,
    finished_only: bool = True,
) -> list[float | None]:
    r"""1 if the final number equals the one after ``####`` in the gold, exactly, else 0.

    The final number is the one in the last \boxed{}, in the last <answer> tag or after ``####``,
    else the last number of the completion. Units, $ and % are ignored: GSM8K's golds are bare
    numbers. A gold without ``####`` must be a number as a whole; None if it is not.

    Args:
        finished_only: A completion cut off by the length limit scores 0, whatever it broke at.
    """
    scores: list[float | None] = []
    for completion, gold, finish in zip(completions, answer, finish_reasons, strict=True):
        expected = _gold(str(gold))
        if expected is None:
            scores.append(None)
        elif finished_only and finish == "length":
            scores.append(0.0)
        else:
            scores.append(float(_final_number(completion_text(completion)) == expected))
    return scores


def _gold(gold: str) -> Fraction | None:
    hashed = after_hashes(gold)
    return _value(gold if hashed is None else hashed)


def _final_number(text: str) -> Fraction | None:
    marked = marked_answer(text)
    whole = None if marked is None else _value(marked)
    if whole is not None:
        return whole
    found = numbers_in(text if marked is None else marked)
    if not found:
        return None
    # "#### 5 of 10": GSM8K's own reading is the first number after the hashes.
    is_hashed = marked is not None and last_boxed(text) is None and marked == after_hashes(text)
    return _value(found[0] if is_hashed else found[-1])


def _value(text: str) -> Fraction | None:
    return exact_number(text.replace("%", ""))


EXAMPLES = (
    Example("48 + 24 = 72, so she sold 72.", 1.0, "last number", {"answer": "48+24=72\n#### 72"}),
    Example("#### 1,000", 1.0, "thousands separator", {"answer": "#### 1000"}),
    Example(
        r"\boxed{18} dollars, as 9 * 2 = 18 and 3 + 4 = 7", 1.0, "a box wins", {"answer": "#### 18"}
    ),
    Example("That is $20%$.", 1.0, "units are ignored", {"answer": "#### 20"}),
    Example("5-3", 0.0, "a minus between numbers is no sign", {"answer": "#### -3"}),
    Example("The total is 72", 0.0, "cut off", {"answer": "#### 72"}, finish="length"),
    Example("No idea.", 0.0, "no number", {"answer": "#### 72"}),
    Example("72", None, "no gold", {"answer": "She sold some."}),
)
