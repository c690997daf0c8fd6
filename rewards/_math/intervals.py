r"""Sets of real numbers as unions of intervals: ``(0, 1]``, ``0 < x \le 1``, ``x \ne 2``."""

from __future__ import annotations

from dataclasses import dataclass

from rlsloth.rewards._math.forms import Expression, Form, Listing, Relation
from rlsloth.rewards._math.same import same_terms
from rlsloth.rewards._math.trees import INFINITY, Term, negative
from rlsloth.rewards._math.values import UndefinedError, approximate, names

_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval with its ends."""

    low: Term
    low_in: bool
    high: Term
    high_in: bool


def as_intervals(form: Form) -> list[Interval] | None:
    """The intervals of a set or a condition on one variable; None for anything else."""
    if isinstance(form, Relation):
        return _of_relation(form)
    if isinstance(form, Expression) and form.term == ("s", "mathbb(R)"):
        return [Interval(negative(INFINITY), False, INFINITY, False)]
    if not isinstance(form, Listing):
        return None
    if form.brackets in ("()", "[]", "(]", "[)") and len(form.items) == 2:
        low, high = form.items
        if isinstance(low, Expression) and isinstance(high, Expression):
            return [Interval(low.term, form.brackets[0] == "[", high.term, form.brackets[1] == "]")]
        return None
    if form.brackets in ("union", ""):
        parts = [as_intervals(item) for item in form.items]
        if all(part is not None for part in parts):
            return [interval for part in parts if part is not None for interval in part]
    return None


def _of_relation(relation: Relation) -> list[Interval] | None:
    sides = [side.term for side in relation.sides if isinstance(side, Expression)]
    if len(sides) != len(relation.sides) or "=" in relation.signs:
        return None
    if len(sides) == 3 and _is_variable(sides[1]) and not names(sides[0]) and not names(sides[2]):
        first, second = relation.signs
        if {first, second} <= {"<", "\\le"}:
            return [Interval(sides[0], first == "\\le", sides[2], second == "\\le")]
        if {first, second} <= {">", "\\ge"}:
            return [Interval(sides[2], second == "\\ge", sides[0], first == "\\ge")]
        return None
    if len(sides) != 2:
        return None
    (left, right), sign = sides, relation.signs[0]
    if _is_variable(right) and not names(left):
        left, right, sign = right, left, _FLIPPED.get(sign, "")
    if not _is_variable(left) or names(right):
        return None
    below, above = negative(INFINITY), INFINITY
    if sign in ("<", "\\le"):
        return [Interval(below, False, right, sign == "\\le")]
    if sign in (">", "\\ge"):
        return [Interval(right, sign == "\\ge", above, False)]
    if sign == "\\ne":
        return [Interval(below, False, right, False), Interval(right, False, above, False)]
    return None


def _is_variable(term: Term) -> bool:
    return bool(term[0] == "s" or (term[0] == "f" and term[1] == "apply"))


def same_intervals(gold: list[Interval], answer: list[Interval]) -> bool:
    """Whether two unions have the same intervals."""
    left, right = _merged(gold), _merged(answer)
    if len(left) != len(right):
        return False
    pairs = zip(left, right, strict=True)
    return all(
        one.low_in == other.low_in
        and one.high_in == other.high_in
        and same_terms(one.low, other.low)
        and same_terms(one.high, other.high)
        for one, other in pairs
    )


def _merged(intervals: list[Interval]) -> list[Interval]:
    """Intervals in order, those that touch or overlap as one."""
    found: list[Interval] = []
    for interval in sorted(intervals, key=_start):
        last = found[-1] if found else None
        if last is None or not _touch(last, interval):
            found.append(interval)
        elif _size(interval.high) > _size(last.high):
            found[-1] = Interval(last.low, last.low_in, interval.high, interval.high_in)
        else:
            closed = last.high_in or (interval.high_in and last.high == interval.high)
            found[-1] = Interval(last.low, last.low_in, last.high, closed)
    return found


def _touch(left: Interval, right: Interval) -> bool:
    if same_terms(left.high, right.low):
        return left.high_in or right.low_in
    return _size(right.low) < _size(left.high)


def _start(interval: Interval) -> tuple[float, float]:
    return (_size(interval.low), _size(interval.high))


def _size(term: Term) -> float:
    if term == INFINITY:
        return float("inf")
    if term == negative(INFINITY):
        return float("-inf")
    try:
        return float(approximate(term, dict.fromkeys(names(term), 1.0), 0).real)
    except (UndefinedError, OverflowError):
        return 0.0
