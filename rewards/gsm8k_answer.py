"""Exact numeric answers to GSM8K and datasets like it."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from rlsloth.scoring.answers import after_hashes, completion_text, final_text, marked_answer
from rlsloth.scoring.example import Example
from rlsloth.scoring.figures import exact_number, numbers_in

_MARKUP = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{|[{}]|\\[,;:! ]|\\?\$|\\?%|[£€¥°]|\*\*")
_OPERATOR = re.compile(r"[-+*/^√×·÷_=\\]")


def gsm8k_answer(
    completions: list[Any],
    answer: list[Any],
    finish_reasons: list[str] | None = None,
    *,
    finished_only: bool = True,
) -> list[float | None]:
    r"""1 if the final number equals the one after ``####`` in the gold, exactly, else 0.

    The final number is the only one in the last \boxed{} or <answer> tag, the first after ``####``,
    else the last number of the completion; what stands before the last </think> does not count.
    Units, $ and % are ignored: GSM8K's golds are bare numbers. A gold without ``####`` must be a
    number as a whole; None if it is not.

    Args:
        finished_only: A completion cut off by the length limit scores 0, whatever it broke at.
    """
    finish = finish_reasons or ["stop"] * len(completions)
    scores: list[float | None] = []
    for completion, gold, reason in zip(completions, answer, finish, strict=True):
        expected = _gold(str(gold))
        if expected is None:
            scores.append(None)
        elif finished_only and reason == "length":
            scores.append(0.0)
        else:
            scores.append(float(_final_number(completion_text(completion)) == expected))
    return scores


def _gold(gold: str) -> Fraction | None:
    hashed = after_hashes(gold)
    return _value(gold if hashed is None else hashed)


def _final_number(text: str) -> Fraction | None:
    text = final_text(text)
    marked = marked_answer(text)
    if marked is None:
        found = numbers_in(text)
        return _value(found[-1]) if found else None
    whole = _value(marked)
    if whole is not None:
        return whole
    if marked == after_hashes(text):
        # "#### 5 of 10": GSM8K's own reading is the first number after the hashes.
        found = numbers_in(marked)
        return _value(found[0]) if found else None
    return _only_number(marked)


def _only_number(marked: str) -> Fraction | None:
    """The one number among words and units, or the right side of an equation; None for
    expressions and for several numbers."""
    words = _MARKUP.sub(" ", marked.rpartition("=")[2])
    found = numbers_in(words)
    if len(found) != 1:
        return None
    rest = words.replace(found[0], " ", 1)
    return None if re.search(r"\d", rest) or _OPERATOR.search(rest) else _value(found[0])


def _value(text: str) -> Fraction | None:
    return exact_number(text.replace("%", ""))


EXAMPLES = (
    Example("48 + 24 = 72, so she sold 72.", 1.0, "last number", {"answer": "48+24=72\n#### 72"}),
    Example("#### 1,000", 1.0, "thousands separator", {"answer": "#### 1000"}),
    Example(
        r"\boxed{18} dollars, as 9 * 2 = 18 and 3 + 4 = 7", 1.0, "a box wins", {"answer": "#### 18"}
    ),
    Example(r"\boxed{20-9}", 0.0, "an expression is not its last number", {"answer": "#### 9"}),
    Example("<think>72?</think> 71", 0.0, "a draft is no answer", {"answer": "#### 72"}),
    Example("That is $20%$.", 1.0, "units are ignored", {"answer": "#### 20"}),
    Example("5-3", 0.0, "a minus between numbers is no sign", {"answer": "#### -3"}),
    Example("The total is 72", 0.0, "cut off", {"answer": "#### 72"}, finish="length"),
    Example("No idea.", 0.0, "no number", {"answer": "#### 72"}),
    Example("72", None, "no gold", {"answer": "She sold some."}),
)
