"""Equality of forms."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlsloth.rewards._math.alphabet import UnreadError
from rlsloth.rewards._math.foreign import foreign_same
from rlsloth.rewards._math.forms import (
    Based,
    Clock,
    Expression,
    Foreign,
    Form,
    Listing,
    Quantity,
    Ratio,
    Relation,
    Words,
)
from rlsloth.rewards._math.intervals import as_intervals, same_intervals
from rlsloth.rewards._math.same import proportional, same_terms
from rlsloth.rewards._math.terms import read_term
from rlsloth.rewards._math.trees import Term, number
from rlsloth.rewards._math.values import names

MOST_ITEMS = 100
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")


def same(gold: Form, answer: Form) -> bool:
    """Whether an answer equals a gold; not symmetric, since the gold's form decides what may be
    left out (``x =``, a unit).

    Raises:
        TooLargeError: their values are too large to be compared.
    """
    if gold == answer:
        return True
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _relations(gold, answer)
    if isinstance(gold, Listing) or isinstance(answer, Listing):
        return _listings(gold, answer)
    if isinstance(gold, Expression) and isinstance(answer, Expression):
        return same_terms(gold.term, answer.term)
    if isinstance(gold, Quantity) or isinstance(answer, Quantity):
        return _quantities(gold, answer)
    if isinstance(gold, Based) or isinstance(answer, Based):
        return _based(gold, answer)
    if isinstance(gold, Ratio) or isinstance(answer, Ratio):
        return _ratios(gold, answer)
    if isinstance(gold, Foreign) or isinstance(answer, Foreign):
        return (
            isinstance(gold, Foreign) and isinstance(answer, Foreign) and foreign_same(gold, answer)
        )
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        return _clock(gold, answer)
    return _words(gold, answer)


def _words(gold: Form, answer: Form) -> bool:
    text, other = _text(gold), _text(answer)
    if text is None or other is None:
        return False
    # "True" and "true" are one word; "B" and "b" one choice. "no" in "none" is not.
    return text.replace(" ", "") == other.replace(" ", "")


def _text(form: Form) -> str | None:
    if isinstance(form, Words):
        return form.text
    if isinstance(form, Expression):
        term = form.term
        if term[0] == "s" and len(term[1]) == 1:
            return str(term[1]).lower()
        return {("c", "e"): "e", ("c", "i"): "i"}.get(term)
    return None


def _clock(gold: Clock, answer: Clock) -> bool:
    mine, theirs = (
        clock.hours * 3600 + clock.minutes * 60 + clock.seconds for clock in (gold, answer)
    )
    return mine == theirs and (gold.half == answer.half or not gold.half or not answer.half)


def _based(gold: Form, answer: Form) -> bool:
    if isinstance(gold, Based) and isinstance(answer, Based):
        return gold.value == answer.value and gold.base == answer.base
    if isinstance(gold, Based) and isinstance(answer, Expression):
        # The question names the base, so an answer may leave it out, as it may a unit.
        return gold.digits.isdigit() and answer.term == number(int(gold.digits))
    if isinstance(gold, Based) and isinstance(answer, Words):
        return answer.text.upper() == gold.digits
    if isinstance(gold, Expression) and isinstance(answer, Based):
        return same_terms(gold.term, number(answer.value))
    return False


def _ratios(gold: Form, answer: Form) -> bool:
    if isinstance(gold, Clock) or isinstance(answer, Clock):
        clock, other = (gold, answer) if isinstance(gold, Clock) else (answer, gold)
        assert isinstance(clock, Clock)
        parts = Ratio((Expression(number(clock.hours)), Expression(number(clock.minutes))))
        return not isinstance(other, Clock) and not clock.half and _ratios(parts, other)
    one, other_parts = _parts(gold), _parts(answer)
    if one is None or other_parts is None or len(one) != len(other_parts):
        return False
    first, second = one[0], other_parts[0]
    return all(
        same_terms(("*", left, second), ("*", right, first))
        for left, right in zip(one[1:], other_parts[1:], strict=True)
    )


def _parts(form: Form) -> list[Term] | None:
    if isinstance(form, Expression):
        return [form.term, number(1)]
    if not isinstance(form, Ratio):
        return None
    terms = [part.term for part in form.parts if isinstance(part, Expression)]
    return terms if len(terms) == len(form.parts) else None


def _quantities(gold: Form, answer: Form) -> bool:
    if isinstance(gold, Quantity) and isinstance(answer, Quantity):
        if gold.unit.measures == answer.unit.measures:
            factors = (number(gold.unit.factor), number(answer.unit.factor))
            return same_terms(("*", gold.term, factors[0]), ("*", answer.term, factors[1]))
        units = (gold.unit, answer.unit)
        if all(unit.measures for unit in units) and any(unit.names_measure for unit in units):
            return False
        return same_terms(gold.term, answer.term)
    quantity, other = (gold, answer) if isinstance(gold, Quantity) else (answer, gold)
    assert isinstance(quantity, Quantity)
    if not isinstance(other, Expression):
        return _words(gold, answer)
    if quantity.compound:
        return False
    if names(other.term):  # "5 m" may be five times m
        try:
            return same_terms(read_term(quantity.source), other.term)
        except UnreadError:
            pass
    return same_terms(quantity.term, other.term)


def _relations(gold: Form, answer: Form) -> bool:
    if not isinstance(answer, Relation):
        assert isinstance(gold, Relation)
        if gold.is_equation:
            named = len(gold.sides) > 2 or _is_name(gold.sides[0])
            return named and same(gold.sides[-1], answer)
        return _as_sets(gold, answer)
    if not isinstance(gold, Relation):
        return same(gold, answer.sides[-1]) if answer.is_equation else _as_sets(gold, answer)
    if gold.is_equation and answer.is_equation:
        return _equations(gold, answer)
    if gold.is_equation or answer.is_equation:
        return False
    if gold.signs == answer.signs and _pairwise(gold.sides, answer.sides):
        return True
    return _as_sets(gold, answer)


def _equations(gold: Relation, answer: Relation) -> bool:
    sides = [(relation.sides[0], relation.sides[-1]) for relation in (gold, answer)]
    if same(sides[0][0], sides[1][0]) and _is_name(sides[0][0]):
        return same(sides[0][1], sides[1][1])
    terms = [
        (left.term, right.term)
        for left, right in sides
        if isinstance(left, Expression) and isinstance(right, Expression)
    ]
    if len(terms) == 2:
        return proportional(*terms)
    return same(sides[0][0], sides[1][0]) and same(sides[0][1], sides[1][1])


def _is_name(form: Form) -> bool:
    """Whether the left side of an equation only names a value: x, f(x), |AB|, A:B, (p, q)."""
    if isinstance(form, Expression):
        return _is_name_term(form.term)
    if isinstance(form, Ratio):
        return all(_is_name(part) for part in form.parts)
    if isinstance(form, Listing):
        return all(_is_name(item) for item in form.items)
    return isinstance(form, Words)


def _is_name_term(term: Term) -> bool:
    if term[0] == "s":
        return True
    if term[0] == "f":
        return term[1] in ("apply", "abs")
    return term[0] in ("*", "/") and all(_is_name_term(part) for part in term[1:])


def _as_sets(gold: Form, answer: Form) -> bool:
    one, other = as_intervals(gold), as_intervals(answer)
    return one is not None and other is not None and same_intervals(one, other)


def _listings(gold: Form, answer: Form) -> bool:
    if not isinstance(gold, Listing) or not isinstance(answer, Listing):
        return _one_and_many(gold, answer)
    mine, theirs = gold.brackets, answer.brackets
    if "union" in (mine, theirs) or "minus" in (mine, theirs) or "intersection" in (mine, theirs):
        return (
            mine == theirs and mine != "minus" and _matched(gold.items, answer.items)
        ) or _as_sets(gold, answer)
    if mine == theirs and mine in ("", "{}"):
        return _matched(gold.items, answer.items) or (not mine and _as_sets(gold, answer))
    if {mine, theirs} == {"", "{}"}:
        return _matched(gold.items, answer.items)
    if mine == "" or theirs == "":
        return _pairwise(_values(gold), _values(answer))
    if "matrix" in (mine, theirs) and mine != theirs:
        return _pairwise(_flat(gold), _flat(answer)) and "{}" not in (mine, theirs)
    if mine != theirs and (
        {mine, theirs} != {"()", "<>"} and (len(gold.items) < 3 or "{}" in (mine, theirs))
    ):
        return False
    return _pairwise(gold.items, answer.items)


def _one_and_many(gold: Form, answer: Form) -> bool:
    many, one = (gold, answer) if isinstance(gold, Listing) else (answer, gold)
    assert isinstance(many, Listing)
    if many.brackets == "{}" and len(many.items) == 1:
        return same(many.items[0], one)
    if many.brackets == "matrix" and len(_flat(many)) == 1:
        return same(_flat(many)[0], one)
    if many.brackets == "" and len(many.items) == 2 and isinstance(one, Expression):
        comma = _decimal_comma(many)
        return comma is not None and same_terms(comma, one.term)
    return _as_sets(gold, answer)


def _decimal_comma(many: Listing) -> Term | None:
    """The number that ``1,22`` is where a comma marks decimals."""
    return (
        None
        if many.written is None or not _DECIMAL_COMMA.fullmatch(many.written)
        else read_term(many.written.replace(",", "."))
    )


def _values(listing: Listing) -> list[Form]:
    """The items, those of the form ``x = 1`` by their values."""
    return [
        item.sides[-1] if isinstance(item, Relation) and item.is_equation else item
        for item in listing.items
    ]


def _flat(listing: Listing) -> list[Form]:
    """The entries of a matrix of one row or column; else its rows."""
    rows = listing.items
    if listing.brackets != "matrix" or not all(isinstance(row, Listing) for row in rows):
        return list(rows)
    inner = [row.items for row in rows if isinstance(row, Listing)]
    if len(inner) == 1:
        return list(inner[0])
    return [row[0] for row in inner] if all(len(row) == 1 for row in inner) else list(rows)


def _pairwise(gold: Sequence[Form], answer: Sequence[Form]) -> bool:
    return len(gold) == len(answer) and all(
        same(left, right) for left, right in zip(gold, answer, strict=True)
    )


def _matched(gold: Sequence[Form], answer: Sequence[Form]) -> bool:
    """Whether the items are the same in some order; one that is repeated counts once."""
    gold, left = _distinct(gold), _distinct(answer)
    if len(gold) != len(left):
        return False
    for item in gold:
        for position, other in enumerate(left):
            if same(item, other):
                del left[position]
                break
        else:
            return False
    return True


def _distinct(items: Sequence[Form]) -> list[Form]:
    found: list[Form] = []
    for item in items[:MOST_ITEMS]:
        if not any(same(item, other) for other in found):
            found.append(item)
    return found
