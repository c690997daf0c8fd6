"""The verdict on an answer: right, wrong, unparsed, timeout or error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from rlsloth.rewards._math.clean import clean
from rlsloth.rewards._math.compare import same
from rlsloth.rewards._math.foreign import foreign_same
from rlsloth.rewards._math.forms import Foreign, Form, Listing, Relation, Words
from rlsloth.rewards._math.intervals import as_intervals
from rlsloth.rewards._math.prose import CUE, candidates, only_formulas
from rlsloth.rewards._math.read import read_clean
from rlsloth.scoring.answers import after_hashes, final_text, marked_answer
from rlsloth.scoring.figures import exact_number

Verdict = Literal["right", "wrong", "unparsed", "timeout", "error"]

_PERCENT = re.compile(r"\\?%|\s*\bper ?cent\b")
_WORDS_OF_A_GOLD = 3
"""Words of a gold without a mark; a longer one is prose."""
_LONGEST_MARK = 8000
_CHOICE = re.compile(
    r"\s*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(?([A-J])\s*[).:]\s*\}?[\s~\\:.]*(?=[^\s~\\:.]|\\[A-Za-z])(.+)",
    re.DOTALL,
)
_MEMBER = re.compile(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer or a gold: its text in one notation, and its form."""

    source: str
    form: Form
    value: Fraction | None
    """Its value, if it is a rational number written out."""


@dataclass(frozen=True, slots=True)
class Gold:
    """A gold that can be read."""

    reading: Reading
    bare: bool
    """It is GSM8K's: a number whose unit (%) the question names."""
    words: bool
    """It is words without a mark, which may be prose."""

    @property
    def is_text(self) -> bool:
        """Whether it is words or a letter."""
        source = self.reading.source
        return isinstance(self.reading.form, Words) or (len(source) == 1 and source.isalpha())


@lru_cache(maxsize=8192)
def read_answer(text: str) -> Reading | None:
    """The reading of a marked answer; None unless all of it can be read."""
    if len(text) > _LONGEST_MARK:
        return None
    value = exact_number(text)
    source = clean(text)
    form = read_clean(source)
    return None if form is None else Reading(source, form, value)


@lru_cache(maxsize=8192)
def read_gold(text: str) -> Gold | None:
    r"""The gold in a text: the part marked by its last \boxed{} or ``####``, else all of it; None
    if it cannot be read, or if it is prose."""
    hashed = None if "\\boxed" in text or "\\fbox" in text else after_hashes(text)
    marked = marked_answer(text)
    reading = read_answer(text.strip() if marked is None else marked)
    if reading is None and marked is None:
        reading = _stated(text)
    if reading is None:
        return None
    if marked is None and _is_prose(reading.form, text):
        return None
    words = marked is None and isinstance(reading.form, Words)
    return Gold(reading, hashed is not None, words)


def _stated(text: str) -> Reading | None:
    """A gold written as a sentence: ``The answer is $5$.`` or ``$21$ or $11$``."""
    if not CUE.search(text) and not only_formulas(text):
        return None
    for candidate, _ in candidates(text):
        reading = read_answer(candidate)
        if reading is not None and not isinstance(reading.form, Words):
            return reading
    return None


def _is_prose(form: Form, text: str) -> bool:
    if isinstance(form, (Listing, Relation)):
        parts = form.items if isinstance(form, Listing) else form.sides
        return any(_is_prose(part, text) for part in parts)
    return (
        isinstance(form, Words)
        and "\\text" not in text
        and len(form.text.split()) > _WORDS_OF_A_GOLD
    )


def judge(text: str, gold: Gold) -> Verdict:
    """The verdict on a completion; TooLargeError if it is too large to be compared."""
    if gold.bare:
        text = _PERCENT.sub("", text)
    marked = marked_answer(text)
    if marked is not None:
        return verdict(marked, gold) if marked else "unparsed"
    found: Verdict = "unparsed"
    for candidate, final in candidates(final_text(text)):
        here = verdict(candidate, gold)
        if here == "right":
            return "right"
        reading = read_answer(candidate)
        if reading is None or (isinstance(reading.form, Words) and not gold.is_text):
            continue  # prose
        if final:
            return "wrong"
        found = "wrong"
    return found


def verdict(answer: str, gold: Gold) -> Verdict:
    """The verdict on a marked answer."""
    reading = read_answer(answer)
    if reading is not None and _same(gold.reading, reading):
        return "right"
    choice = _CHOICE.match(answer)
    if choice is not None:
        # "(B) 12" names one answer twice; the gold says by which name.
        named = read_answer(choice[1] if len(gold.reading.source) == 1 else choice[2])
        if named is not None:
            return "right" if _same(gold.reading, named) else "wrong"
    return "unparsed" if reading is None else "wrong"


def _same(gold: Reading, answer: Reading) -> bool:
    if gold.value is not None and answer.value is not None:
        return gold.value == answer.value
    if gold.source == answer.source:
        return True
    if same(gold.form, answer.form):
        return True
    forms = (gold.form, answer.form)
    if any(isinstance(form, Foreign) for form in forms) or (
        all(map(_is_set, forms)) and not _all_intervals(*forms)
    ):
        one, other = (Foreign(_MEMBER.sub("", reading.source)) for reading in (gold, answer))
        return foreign_same(one, other)
    return False


def _is_set(form: Form) -> bool:
    """Whether a form is one that the library may still compare: a set, or an inequality."""
    if isinstance(form, Relation):
        return not form.is_equation
    if isinstance(form, Listing):
        joined = form.brackets in ("union", "minus", "intersection")
        return joined or (len(form.items) == 2 and form.brackets in ("()", "[]", "(]", "[)"))
    return False


def _all_intervals(*forms: Form) -> bool:
    """Whether all forms are unions of intervals, on which ``same`` has decided."""
    return all(as_intervals(form) is not None for form in forms)


def gold_texts(gold: Any) -> list[str]:
    """The texts of a gold: of a number, a text, or a list of golds of which any may be met."""
    if isinstance(gold, bool):
        return [str(gold)]
    if isinstance(gold, (int, float)):
        return [str(gold)]
    if isinstance(gold, str):
        return [gold]
    if isinstance(gold, list):
        return [text for item in gold if not isinstance(item, list) for text in gold_texts(item)]
    return []
