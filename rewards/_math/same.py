"""Equality of expressions, decided by exact arithmetic where it can be, else by their values at
points that depend on the names of their variables."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from rlsloth.rewards._math.trees import I, Term
from rlsloth.rewards._math.values import (
    UndefinedError,
    approximate,
    exact,
    has_constant,
    names,
    unit_interval,
)

POINTS = 6
"""Points at which two expressions must agree: three with positive variables, three with any."""
_ROUGH, _FINE = 1e-6, 1e-45
_ROUGH_ZERO = 1e-10
_NOISE = (1e-80, 1e-45)
"""The rest of a zero at 60 digits; a value that is really this small is smaller."""
_DECIMALS, _DECIMALS_RELATIVE = 5e-7, 1e-5


def same_terms(gold: Term, answer: Term) -> bool:
    """Whether two terms have the same value for all values of their variables.

    Rational numbers are compared exactly. An irrational number and a decimal are the same if they
    agree to six decimals.

    Raises:
        TooLargeError: they are too large to be compared.
    """
    if gold == answer:
        return True
    try:
        one, other = exact(gold), exact(answer)
    except UndefinedError:
        return False
    if one is not None and other is not None:
        return one == other
    gold, answer = _one_case(gold, answer)
    decimal = _decimal(gold, one, other) or _decimal(answer, other, one)
    if decimal and not names(gold) and not names(answer):
        return _same_decimals(gold, answer)
    return _agree(gold, answer)


def proportional(gold: tuple[Term, Term], answer: tuple[Term, Term]) -> bool:
    """Whether two equations, pairs of sides, say the same: their differences are multiples."""
    one, other = (
        ("+", left, ("*", ("n", Fraction(-1), False), right)) for left, right in (gold, answer)
    )
    if not names(one) or not names(other):
        return same_terms(gold[0], answer[0]) and same_terms(gold[1], answer[1])
    one, other = _one_case(one, other)
    if names(one) != names(other):
        return False
    ratios = []
    for salt, point, _ in _points(names(one)):
        try:
            top = approximate(one, point, salt, precise=True)
            bottom = approximate(other, point, salt, precise=True)
        except UndefinedError:
            continue
        if bottom == 0 or top == 0:
            return False
        ratios.append(top / bottom)
    return len(ratios) >= 3 and all(abs(r / ratios[0] - 1) < 1e-40 for r in ratios)


def _decimal(term: Term, value: Fraction | None, other: Fraction | None) -> bool:
    """Whether a term is a decimal number whose counterpart is irrational."""
    return value is not None and other is None and _has_decimal(term)


def _has_decimal(term: Term) -> bool:
    if term[0] == "n":
        return bool(term[2])
    return any(_has_decimal(part) for part in term[1:] if isinstance(part, tuple))


def _same_decimals(gold: Term, answer: Term) -> bool:
    try:
        one = approximate(gold, {}, 0, precise=True)
        other = approximate(answer, {}, 0, precise=True)
    except UndefinedError:
        return False
    gap = abs(one - other)
    return bool(gap <= _DECIMALS and gap <= _DECIMALS_RELATIVE * abs(one))


def _one_case(gold: Term, answer: Term) -> tuple[Term, Term]:
    """Both terms with names in small letters, if they differ in that alone and none is used in
    both cases."""
    mine, theirs = names(gold), names(answer)
    if mine == theirs:
        return gold, answer
    both = mine | theirs
    small = {name.lower() for name in both}
    if {n.lower() for n in mine} != {n.lower() for n in theirs} or len(small) != len(mine):
        return gold, answer
    return _lowered(gold), _lowered(answer)


def _lowered(term: Term) -> Term:
    if term[0] == "s":
        return ("s", term[1].lower())
    return tuple(_lowered(part) if isinstance(part, tuple) else part for part in term)


def _points(variables: set[str]) -> Iterator[tuple[int, dict[str, float], bool]]:
    for salt in range(POINTS):
        positive = salt < POINTS // 2
        yield (
            salt,
            {
                name: 0.4 + 2 * unit_interval(name, salt)
                if positive
                else 5 * (unit_interval(name, salt) - 0.5)
                for name in variables
            },
            positive,
        )


def _agree(gold: Term, answer: Term) -> bool:
    variables = names(gold) | names(answer)
    imaginary = has_constant(gold, I) or has_constant(answer, I)
    for precise in (False, True):
        met = 0
        for salt, point, positive in _points(variables):
            if not variables and salt:
                break
            values = [_value(term, point, salt, precise) for term in (gold, answer)]
            if values[0] is None or values[1] is None:
                if values[0] is not values[1] and positive:
                    return False
                continue
            if not positive and not imaginary and not any(map(_is_real, values)):
                continue  # outside the domain of both
            if not _near(values[0], values[1], precise):
                return False
            met += 1
        if met < (1 if not variables else 2):
            return False
    return True


def _value(term: Term, point: dict[str, float], salt: int, precise: bool) -> Any:
    try:
        return approximate(term, point, salt, precise)
    except UndefinedError:
        return None


def _is_real(value: Any) -> bool:
    return bool(abs(value.imag) <= 1e-9 * (1 + abs(value.real)))


def _near(one: Any, other: Any, precise: bool) -> bool:
    gap = abs(one - other)
    if precise:
        zero = one == 0 or other == 0
        return bool(
            gap <= _FINE * max(abs(one), abs(other)) or (zero and _NOISE[0] < gap < _NOISE[1])
        )
    # Only to refute: 15 digits lose many where large terms cancel.
    return bool(gap <= _ROUGH * max(abs(one), abs(other)) or gap <= _ROUGH_ZERO)
