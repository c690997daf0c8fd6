r"""Numbers with units: ``5 m/s``, ``3 hours 20 minutes``, ``90^\circ``, ``$2.5 million``."""

from __future__ import annotations

import re
from fractions import Fraction

from rlsloth.rewards._math.alphabet import UnreadError
from rlsloth.rewards._math.forms import Form, Quantity
from rlsloth.rewards._math.terms import read_term
from rlsloth.rewards._math.trees import Term, number
from rlsloth.rewards._math.units import Unit, is_plain_unit, read_unit
from rlsloth.rewards._math.values import names

_TEXT = re.compile(r"\\(?:text|mathrm)\s*\{([^{}]*)\}")
_START = re.compile(r"\s*\\(?:text|mathrm)\s*\{|\s+(?=[A-Za-z°¢])|(?<=[\d}])(?=[A-Za-z]{2})")
_DEGREES = re.compile(r"(.*?\S)\s*\^\\circ\s*(?:\\(?:text|mathrm)\s*\{\s*)?([CF])?\s*\}?")
_SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_DEGREE = Unit((("angle", 1),), Fraction(1), True)
_COMPOUND = re.compile(
    r"(\d+(?:\.\d+)?(?: ?\\frac\{\d+\}\{\d+\})?)\s*([A-Za-z]+)\.?\s*(?:,|and\b)?\s*"
)
_OPERATOR = re.compile(r"[=<>,;:&|]|\\(?:le|ge|ne|in|pm|cup)(?![A-Za-z])")


def read_quantity(text: str, _depth: int = 0) -> Form | None:
    """A quantity that covers the whole text; None if it is none."""
    if (
        not text[-1].isalpha()
        and text[-1] not in "}°¢"
        and not re.search(r"[A-Za-z}]\^\{?-?\d\}?$|\\circ", text)
    ):
        return None
    degrees = _DEGREES.fullmatch(text)
    if degrees:
        return _degrees(text, degrees[1], degrees[2])
    compound = _compound(text)
    if compound is not None:
        return compound
    if _OPERATOR.search(text):
        return None
    for match in _START.finditer(text):
        head, tail = text[: match.start()].strip(), text[match.start() :]
        if not head or head[-1] in "+-*/^_\\({[":
            continue
        found = _quantity(text, head, tail)
        if found is not None:
            return found
    return None


def _quantity(text: str, head: str, tail: str) -> Form | None:
    try:
        term = read_term(head)
    except UnreadError:
        return None
    in_text = "\\text" in tail or "\\mathrm" in tail
    words = _TEXT.sub(r" \1 ", tail).split()
    while words and words[0].lower() in _SCALES:
        term = ("*", term, number(_SCALES[words.pop(0).lower()]))
    bare = " ".join(words)
    unit = read_unit(bare) if bare else None
    if unit is None:
        return None if bare else Quantity(term, Unit((), Fraction(1), True), text)
    glued = tail[0].isalpha()
    if glued and not is_plain_unit(words[0]):
        return None
    if not in_text and (names(term) or not unit.known) and not _is_noun(head, tail, words):
        return None
    return Quantity(term, unit, text)


def _is_noun(head: str, tail: str, words: list[str]) -> bool:
    """Whether words after a number can only be a noun: ``5 apples``, but not ``2 sin x``."""
    try:
        read_term(head + tail)
    except UnreadError:
        return all(len(word) > 1 for word in words) and not re.search(r"[A-Za-z]", head)
    return False


def _degrees(text: str, head: str, scale: str | None) -> Form | None:
    try:
        term = read_term(head)
    except UnreadError:
        return None
    if re.search(r"[A-Za-z]{2}", head) and not head.startswith(("\\frac", "\\sqrt")):
        return None  # \sin 30^\circ: the degrees are the function's
    measure = {"C": "celsius", "F": "fahrenheit"}.get(scale or "", "angle")
    return Quantity(term, Unit(((measure, 1),), Fraction(1), True), text)


def _compound(text: str) -> Form | None:
    """A sum of units of one kind, such as ``3 hours and 20 minutes``."""
    plain = _TEXT.sub(r" \1 ", text).replace("\\text", " ")
    total, end, count = Fraction(0), 0, 0
    measures = None
    plain = plain.strip()
    for match in _COMPOUND.finditer(plain):
        if match.start() != end:
            return None
        unit = read_unit(match[2])
        if unit is None or not unit.known or measures not in (None, unit.measures):
            return None
        measures = unit.measures
        total += Fraction(_simple(match[1])) * unit.factor
        end, count = match.end(), count + 1
    if count < 2 or end != len(plain) or measures is None:
        return None
    return Quantity(number(total), Unit(measures, Fraction(1), True), text, compound=True)


def _simple(text: str) -> Fraction:
    value: Term = read_term(text)
    return value[1] if value[0] == "n" else Fraction(0)


__all__ = ["read_quantity"]
