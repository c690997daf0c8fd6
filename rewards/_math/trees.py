"""Trees of expressions.

A tree is a tuple: ("n", number, is_decimal), ("s", name), ("c", constant), (operator, left, right)
with + * / ^, or ("f", function, arguments...).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

Term = tuple[Any, ...]
I, E, PI, INFINITY = ("c", "i"), ("c", "e"), ("c", "pi"), ("c", "inf")


def number(value: int | Fraction) -> Term:
    """The tree of a number."""
    return ("n", Fraction(value), False)


def negative(term: Term) -> Term:
    """The tree of minus a term."""
    return ("n", -term[1], term[2]) if term[0] == "n" else ("*", number(-1), term)
