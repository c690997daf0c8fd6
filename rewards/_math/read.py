"""Reading a marked answer or a gold as a form, or not at all."""

from __future__ import annotations

import re
from dataclasses import replace

from rlsloth.rewards._math.alphabet import UnreadError
from rlsloth.rewards._math.clean import clean
from rlsloth.rewards._math.foreign import read_foreign
from rlsloth.rewards._math.forms import (
    Based,
    Clock,
    Expression,
    Form,
    Listing,
    Ratio,
    Relation,
    Words,
)
from rlsloth.rewards._math.quantities import read_quantity
from rlsloth.rewards._math.split import enclosed, separators, split
from rlsloth.rewards._math.terms import LONGEST, read_term

_LABEL = re.compile(
    r"^(?:\\text\s*\{[^{}]*:\s*\}|(?:so |the |my |final |correct )*"
    r"(?:answer|option|choice|result|solution)\s*(?:is|:|=)\s*)",
    re.IGNORECASE,
)
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WHOLE_TEXT = re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}")
_CLOCK = re.compile(
    r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(?:\\text\s*\{)?\s*(?:([ap])\.?\s*m\.?)?\s*\}?",
    re.IGNORECASE,
)
_BASED = re.compile(
    r"\(?([0-9A-Fa-f]+)\)?\s*_\s*(?:\{\s*(?:\\text\s*\{)?\s*(\d{1,2}|two|eight|ten|sixteen)\s*\}*|(\d{1,2}))"
)
_BASES = {"two": 2, "eight": 8, "ten": 10, "sixteen": 16}
_AND = re.compile(
    r"\s*,?\s*(?:\\text\s*\{[\s,]*(?:and|or|y|et|und)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])|[和或与])\s*,?\s*"
)
_RELATION = re.compile(
    r"\\(?:ne|le|ge|in|notin|approx|equiv|sim|to|rightarrow|subset|subseteq)(?![A-Za-z])|:=|[=<>]"
)
_SETS = (
    ("union", r"\\cup(?![A-Za-z])"),
    ("minus", r"\\setminus(?![A-Za-z])"),
    ("intersection", r"\\cap(?![A-Za-z])"),
)
_BUILDER = re.compile(r"^([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?[|:]\s*(.+)$")
_OUTWARD = re.compile(r"\][^\[\](){},]+,[^\[\](){},]+[\[\]]|\[[^\[\](){},]+,[^\[\](){},]+\[")
"""Intervals with brackets turned outwards, ``]0, 1[``."""
_SENTENCE = re.compile(r"[A-Za-z0-9 ,.'\"\-/&:?()]+")
_PUNCTUATION = re.compile(r"[^a-z0-9]+")
_WORD = re.compile(r"[A-Za-z]{2}")
_ELLIPSIS = Words("...")
MOST_WORDS = 200


def read(text: str) -> Form | None:
    """The form of a text as it was written; None unless all of it can be read."""
    if len(text) > 4 * LONGEST:
        return None
    return read_clean(clean(text))


def read_clean(text: str, depth: int = 0) -> Form | None:
    """The form of a cleaned text."""
    text = text.strip(" \n\t.")
    if not text or len(text) > LONGEST or depth > 12:
        return None
    if text.startswith("{") and enclosed(text, "{", "}"):
        return read_clean(text[1:-1], depth + 1)
    unlabelled = _LABEL.sub("", text)
    if unlabelled != text and unlabelled:
        return read_clean(unlabelled, depth + 1)
    whole = _WHOLE_TEXT.fullmatch(text)
    if whole and not text.startswith("\\mathbf"):
        return read_clean(whole[1], depth + 1) or words(whole[1])
    for reader in (
        _plain,
        read_quantity,
        _several,
        _relation,
        _sets,
        _bracketed,
        _ratio,
        _expression,
    ):
        form = reader(text, depth)
        if form is not None:
            return form
    form = words(text)
    return form if form is not None else read_foreign(text)


def words(text: str) -> Words | None:
    """Words alone, with numbers among them at most."""
    bare = _TEXT.sub(r" \1 ", text).strip()
    if not _SENTENCE.fullmatch(bare) or not re.search("[A-Za-z]", bare):
        return None
    canonical = " ".join(_PUNCTUATION.sub(" ", bare.lower().replace("'", "")).split())
    return Words(canonical) if canonical and len(canonical.split()) <= MOST_WORDS else None


def _plain(text: str, _depth: int) -> Form | None:
    """Times, digits in a base, and dots: forms that a pattern tells apart."""
    clock = _CLOCK.fullmatch(text)
    if clock:
        return Clock(int(clock[1]), int(clock[2]), int(clock[3] or 0), (clock[4] or "").lower())
    based = _BASED.fullmatch(re.sub(r"^\\text\s*\{\s*([0-9A-F]+)\s*\}", r"\1", text))
    if based and (text.startswith("\\text") or any(map(str.isdigit, based[1]))):
        name = based[2] or based[3]
        base = _BASES.get(name) or int(name)
        if 2 <= base <= 36 and all(int(digit, 36) < base for digit in based[1]):
            return Based(based[1].upper().lstrip("0") or "0", base)
        return None
    if text == "\\ldots":
        return _ELLIPSIS
    return None


def _several(text: str, depth: int) -> Form | None:
    """A list with commas, semicolons or words between its items; plus-minus is a list of two."""
    text = _AND.sub(", ", text) if _AND.search(text) else text
    parts = split(text, ";")
    if any(len(split(part, ",")) > 1 for part in parts) and len(parts) > 1:
        parts = [part if part.strip().startswith("(") else f"({part})" for part in parts]
    if len(parts) == 1:
        parts = split(text, ",")
    if len(parts) > 1:
        found = listing([part for part in parts if part.strip()] or [""], "", depth)
        return found if found is None or len(parts) > 2 else replace(found, written=text)
    if "\\pm" in text and not _RELATION.search(text):
        up = text.replace("\\pm", "+").replace("\\mp", "-")
        down = text.replace("\\pm", "-").replace("\\mp", "+")
        return listing([up, down], "", depth)
    return None


def listing(parts: list[str], brackets: str, depth: int) -> Listing | None:
    """A list of forms; None if one of the parts cannot be read."""
    items: list[Form] = []
    for part in parts:
        form = read_clean(part, depth + 1)
        if form is None:
            return None
        if isinstance(form, Listing) and form.brackets == "":
            items += form.items
        else:
            items.append(form)
    return Listing(tuple(items), brackets)  # type: ignore[arg-type]


def _relation(text: str, depth: int) -> Form | None:
    sides = split(text, _RELATION)
    if len(sides) == 1:
        return None
    signs = separators(text, _RELATION)
    if "\\approx" in signs:
        # The exact side counts: in "x = 22/7 \approx 3.14" the one before it.
        cut = signs.index("\\approx")
        if cut == 0 and re.fullmatch(r"\\?[A-Za-z]+(?:_\S+)?", sides[0].strip()):
            return read_clean(sides[1], depth + 1)
        sides, signs = sides[: cut + 1], signs[:cut]
        if not signs:
            return read_clean(sides[0], depth + 1)
    if "\\pm" in sides[-1] and all(sign == "=" for sign in signs):
        return read_clean(sides[-1], depth + 1)
    forms = [read_clean(side, depth + 1) or _name(side) for side in sides]
    if any(form is None for form in forms):
        return None
    known = tuple(form for form in forms if form is not None)
    if signs == ["\\in"] or signs == [":="]:
        return known[1]
    return Relation(known, tuple(signs))


def _name(side: str) -> Words | None:
    """The left side of an equation that only names something, such as ``S_{ABC}``."""
    bare = side.strip()
    return (
        Words(re.sub(r"\s", "", bare)) if re.fullmatch(r"[\\A-Za-z_{}\d' ]{1,40}", bare) else None
    )


def _sets(text: str, depth: int) -> Form | None:
    for brackets, pattern in _SETS:
        parts = split(text, re.compile(pattern))
        if len(parts) > 1:
            return listing(parts, brackets, depth)
    return None


def _bracketed(text: str, depth: int) -> Form | None:
    if text.startswith("\\begin"):
        return _matrix(text, depth)
    if _OUTWARD.fullmatch(text):
        ends = ("(" if text[0] == "]" else "[") + (")" if text[-1] == "[" else "]")
        return listing(text[1:-1].split(","), ends, depth)
    opening, closing = ("\\{", "\\}") if text.startswith("\\{") else (text[0], text[-1])
    if text.startswith("\\langle") and text.endswith("\\rangle"):
        return listing(split(text[7:-7], ","), "<>", depth)
    if opening == "\\{" and text.endswith("\\}"):
        inner = text[2:-2].strip()
        builder = _BUILDER.match(inner)
        if builder:
            return read_clean(builder[2], depth + 1)
        return (
            Listing((), "{}")
            if not inner
            else listing(split(_AND.sub(", ", inner), ","), "{}", depth)
        )
    if opening not in "([" or closing not in ")]" or not enclosed(text, opening, closing):
        return None
    parts = split(text[1:-1], ",")
    if len(parts) == 1:
        parts = split(text[1:-1], ";")
    if len(parts) == 1:
        single = opening + closing == "()" or parts[0].strip().startswith("\\begin")
        return read_clean(parts[0], depth + 1) if single else None
    return listing(parts, opening + closing, depth)


def _matrix(text: str, depth: int) -> Form | None:
    match = re.fullmatch(
        r"\\begin\s*\{([pb]?matrix|array)\}\s*(?:\{[lcr| ]*\})?(.*)\\end\s*\{\1\}", text, re.DOTALL
    )
    if not match or "\\begin" in match[2]:
        return None
    rows = [row for row in match[2].split("\\cr") if row.strip()]
    found = [listing(row.split("&"), "matrix", depth) for row in rows]
    if any(row is None for row in found):
        return None
    return Listing(tuple(row for row in found if row is not None), "matrix")


def _ratio(text: str, depth: int) -> Form | None:
    parts = split(text, ":")
    if len(parts) == 1 or not any(character.isalnum() for character in parts[0]):
        return None
    forms = [read_clean(part, depth + 1) for part in parts]
    if any(not isinstance(form, (Expression, Words)) for form in forms):
        return None
    return Ratio(tuple(form for form in forms if form is not None))


def _expression(text: str, _depth: int) -> Form | None:
    if _is_word(text):
        return None
    try:
        return Expression(read_term(text))
    except UnreadError:
        return None


def _is_word(text: str) -> bool:
    """Whether a run of letters is a word rather than a product: CADB, on, AB; but xy, ab."""
    if not text.isalpha() or not text.isascii() or len(text) == 1:
        return False
    if text in ("pi", "oo", "inf", "infty", "infinity"):
        return False
    product = re.fullmatch(r"[bckmnpqrtxyz]{2,3}|a[bcnxyz]|[bcxyz]a|[2-9]?[ei]x|x[ei]", text)
    return product is None or text in ("by", "my", "cry", "try", "pry", "an")
