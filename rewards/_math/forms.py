"""Forms of answers: numbers and expressions, quantities, words, times, ratios, lists, sets and
relations. A form covers the whole text that it was read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from rlsloth.rewards._math.trees import Term
from rlsloth.rewards._math.units import Unit

Brackets = Literal[
    "", "{}", "()", "[]", "(]", "[)", "<>", "union", "matrix", "intersection", "minus"
]


@dataclass(frozen=True, slots=True)
class Expression:
    """A number or an expression."""

    term: Term


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with a unit; a sum such as ``3 feet 4 inches`` is given in base units."""

    term: Term
    unit: Unit
    source: str
    compound: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """Words, which are compared letter by letter."""

    text: str


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day, or a duration, with two dots: ``2:30 pm``."""

    hours: int
    minutes: int
    seconds: int
    half: str
    """a or p; empty if it is not given."""


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a base: ``101_2``."""

    digits: str
    base: int

    @property
    def value(self) -> Fraction:
        """The number."""
        return Fraction(int(self.digits, self.base))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Two or more parts with two dots between them."""

    parts: tuple[Form, ...]


@dataclass(frozen=True, slots=True)
class Listing:
    """Several forms: a list, a set, a tuple, an interval, a union, or the rows of a matrix."""

    items: tuple[Form, ...]
    brackets: Brackets
    written: str | None = field(default=None, compare=False)
    """The text, where a comma may also be that of a decimal."""


@dataclass(frozen=True, slots=True)
class Relation:
    """Sides with =, <, ... between them."""

    sides: tuple[Form, ...]
    signs: tuple[str, ...]

    @property
    def is_equation(self) -> bool:
        """Whether all signs are =."""
        return all(sign == "=" for sign in self.signs)


@dataclass(frozen=True, slots=True)
class Foreign:
    """A text that the library latex2sympy2 reads as a whole, and this package does not."""

    source: str


Form = Expression | Quantity | Words | Clock | Based | Ratio | Listing | Relation | Foreign
