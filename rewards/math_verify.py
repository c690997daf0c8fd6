"""Mathematical equality with a gold answer, by exact arithmetic and the math-verify library."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from math_verify import parse, verify

from rlsloth.errors import UserError
from rlsloth.scoring.answers import (
    after_hashes,
    completion_text,
    exact_number,
    last_boxed,
    marked_answer,
    plain,
)
from rlsloth.scoring.example import Example

_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[")
_PROSE = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{2,} [A-Za-z]{2,}")


def math_verify(
    completions: list[Any],
    finish_reasons: list[str],
    solution: list[Any] | None = None,
    answer: list[Any] | None = None,
    *,
    finished_only: bool = True,
) -> list[float | None]:
    r"""1 if the final answer equals the gold one mathematically, else 0.

    The gold is the row's ``solution``, else its ``answer``: the part marked by its last \boxed{} or
    ``####``, or all of it. The answer is the part marked by the completion's last \boxed{},
    <answer> tag or ``####``, else the expression that math-verify finds. Rational numbers are
    compared exactly; an irrational number and a decimal are compared to math-verify's six digits.
    None if the gold cannot be read.

    Args:
        finished_only: A completion cut off by the length limit scores 0. Without it, a policy is
            paid for numbers that it passes on the way and drifts to answers that never end.

    Raises:
        UserError: the data has neither column.
    """
    if solution is None and answer is None:
        raise UserError("reward 'math_verify' needs a column 'solution' or 'answer' with the gold")
    absent = [None] * len(completions)
    rows = zip(completions, finish_reasons, solution or absent, answer or absent, strict=True)
    return [
        _score(
            None if finished_only and finish == "length" else completion_text(completion),
            second if first is None else first,
        )
        for completion, finish, first, second in rows
    ]


def _score(text: str | None, gold: Any) -> float | None:
    if not isinstance(gold, (str, int, float)):
        return None
    gold_text, bare = _gold_text(str(gold))
    gold_number = exact_number(gold_text)
    gold_parsed = () if gold_number is not None else _parse(gold_text)
    if gold_number is None and not gold_parsed:
        return None
    if text is None:
        return 0.0
    text = plain(text)
    if bare:
        text = re.sub(r"\\?%", "", text)
    marked = marked_answer(text)
    number = exact_number(marked) if marked is not None else None
    if number is not None and gold_number is not None:
        return float(number == gold_number)
    parsed = _parse(text if marked is None else marked)
    return float(bool(parsed) and _equal(gold_text, gold_parsed or _parse(gold_text), parsed))


def _gold_text(gold: str) -> tuple[str, bool]:
    """The gold answer, and whether it is GSM8K's: a number whose unit (%) the question names."""
    boxed = last_boxed(gold)
    if boxed is not None:
        return plain(boxed), False
    hashed = after_hashes(gold)
    return plain(gold if hashed is None else hashed).strip(), hashed is not None


@lru_cache(maxsize=1024)
def _parse(text: str) -> tuple[Any, ...]:
    """Return the expression that math-verify finds, and its text; empty if there is none.

    math-verify's own timeouts are off: they count wall-clock time, so a busy machine would turn
    right answers into wrong ones. The scorer's CPU budget replaces them.
    """
    if not _DELIMITED.search(text) and not _PROSE.search(text):
        text = f"${text}$"
    return tuple(parse(text, parsing_timeout=None))


def _equal(gold_text: str, gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
    exact_gold = exact_number(gold_text)
    if exact_gold is None:
        exact_gold = _rational(gold)
    exact_answer = _rational(answer)
    if exact_gold is not None and exact_answer is not None:
        return exact_gold == exact_answer
    if _differ_in_order(gold, answer) or _differ_in_order(answer, gold):
        return False
    # verify() is not symmetric: the gold comes first.
    return bool(verify(gold[0], answer[0], timeout_seconds=None, allow_set_relation_comp=True))


def _rational(parsed: tuple[Any, ...]) -> Fraction | None:
    """The exact value of a parsed rational number such as 1/2^99; None for anything else."""
    expression = parsed[0]
    if isinstance(expression, sympy.Float):
        return exact_number(parsed[-1])  # as written: a Float holds 15 digits
    if not isinstance(expression, sympy.Expr) or not expression.is_number:
        return None
    decimals = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    value = expression.xreplace(decimals).doit()
    return Fraction(int(value.p), int(value.q)) if value.is_Rational else None


def _differ_in_order(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether one is written as a set, {1, 2}, and the other as a pair or an interval, (1, 2)."""
    is_set = isinstance(one[0], sympy.FiniteSet) and "\\{" in one[-1]
    return is_set and isinstance(other[0], (sympy.Tuple, sympy.Interval))


EXAMPLES = (
    Example(
        r"So $x = \boxed{\frac{\sqrt{2}}{2}}$.",
        1.0,
        "an equal form",
        {"solution": r"The root is $\boxed{\frac{1}{\sqrt{2}}}$."},
    ),
    Example("The answer is 72.", 1.0, "gold after ####", {"answer": "48 + 24 = 72\n#### 72"}),
    Example(r"\boxed{48} no, \boxed{72}", 1.0, "the last box counts", {"answer": "#### 72"}),
    Example(r"\boxed{1,234.50}", 1.0, "thousands separator", {"answer": "1234.5"}),
    Example(r"\boxed{0.1000001}", 0.0, "no rounding", {"answer": "0.1"}),
    Example(r"\boxed{10}", 0.0, "10% is 1/10", {"answer": r"10\%"}),
    Example(r"\boxed{72}, or else 7", 0.0, "cut off", {"answer": "72"}, finish="length"),
    Example("I do not know.", 0.0, "no answer", {"answer": "5"}),
    Example(r"\boxed{5}", None, "no gold", {"answer": ""}),
)
