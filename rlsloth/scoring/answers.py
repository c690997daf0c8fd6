"""The final answer in a text, and its value as an exact number."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

# Full-width forms to ASCII, and the typographic minus and spaces.
_PLAIN = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_PLAIN |= {0x2212: "-", 0x00A0: " ", 0x202F: " ", 0x2009: " "}

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_SCIENTIFIC = re.compile(r"(?<![\w.\\])\d+(?:\.\d+)?[eE][+-]?\d{1,2}(?![\w.])")
_LAYOUT = re.compile(r"\\left|\\right|\\[!,;: ]|\\\(|\\\)|[$£€]|\\(?=[$£€%])")
_EXACT = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<top>{_DIGITS})\.?(?:\s*/\s*(?P<bottom>{_DIGITS}))?"
    rf"|\\[dt]?frac\s*{{\s*(?P<frac_top>[+-]?{_DIGITS})\s*}}\s*{{\s*(?P<frac_bottom>{_DIGITS})\s*}}"
    r"|\\[dt]?frac\s*(?P<digit_top>\d)\s*(?P<digit_bottom>\d))\s*(?P<percent>%?)\.?"
)
# A hyphen is a sign where it touches the number and no operand: "is -3" but not "5-3" or "5 - 3".
_IN_TEXT = re.compile(rf"(?:(?<![\w)\]}}%.])-)?[$£€]?{_DIGITS}(?:/{_DIGITS})?%?")
_LONGEST = 1000
"""Characters of the longest number that is parsed; Python limits the digits of longer ones."""


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion; for chat messages, that of the last one."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):  # multimodal parts
        content = "".join(part.get("text", "") for part in content)
    return content or ""


def plain(text: str) -> str:
    """Write full-width digits and typographic signs in ASCII, and scientific notation out."""
    text = text.translate(_PLAIN)
    return _SCIENTIFIC.sub(lambda match: f"{Decimal(match.group()):f}", text)


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}`` or ``\fbox{...}``."""
    for match in reversed(list(re.finditer(r"\\f?box(?:ed)?\s*\{", text))):
        depth = 1
        for brace in re.finditer(r"(?<!\\)[{}]", text[match.end() :]):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                return text[match.end() : match.end() + brace.start()].strip()
    return None


def last_tag(text: str, tag: str) -> str | None:
    """The content of the last complete ``<tag>...</tag>``."""
    parts = re.findall(rf"<{tag}>((?:(?!<{tag}>).)*?)</{tag}>", text, flags=re.DOTALL)
    return parts[-1].strip() if parts else None


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last ``####``: GSM8K's final answer."""
    _, hashes, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if hashes else None


def marked_answer(text: str) -> str | None:
    """The answer that a text marks as final: in a box, else an answer tag, else after ``####``."""
    for found in (last_boxed(text), last_tag(text, "answer"), after_hashes(text)):
        if found:
            return found
    return None


def exact_number(text: str) -> Fraction | None:
    r"""Parse a whole text as a number: integer, decimal, a/b, \frac{a}{b}; with commas, $ and %.

    Exact: 0.1 is 1/10, and 10% is 1/10. None for any other text.
    """
    if len(text) > _LONGEST:
        return None
    tidy = _LAYOUT.sub("", plain(text).replace("{,}", ",")).strip()
    match = _EXACT.fullmatch(tidy)
    if match is None:
        return None
    top = match["top"] or match["frac_top"] or match["digit_top"]
    bottom = match["bottom"] or match["frac_bottom"] or match["digit_bottom"] or "1"
    denominator = Fraction(bottom.replace(",", ""))
    if denominator == 0:
        return None
    value = Fraction(top.replace(",", "")) / denominator
    value = -value if match["sign"] == "-" else value
    return value / 100 if match["percent"] else value


def numbers_in(text: str) -> list[str]:
    """The numbers in a text, in order, as they are written."""
    return _IN_TEXT.findall(plain(text).replace("{,}", ",").replace("\\$", "$"))
