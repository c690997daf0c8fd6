"""Numbers in a text, and their exact values."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

# Full-width forms to ASCII, and the typographic minus and spaces.
_PLAIN = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_PLAIN |= dict.fromkeys((0x2212, 0x2010, 0x2011, 0xFE63), "-")
_PLAIN |= dict.fromkeys((0x00A0, 0x202F, 0x2009, 0x2007, 0x2002, 0x2003, 0x200A, 0x3000), " ")
_PLAIN |= dict.fromkeys((0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0x00AD), "")

_DIGITS = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_SCIENTIFIC = re.compile(r"(?<![\w.\\])\d+(?:\.\d+)?[eE][+-]?\d{1,2}(?![\w.])")
_TIMES_TEN = re.compile(
    r"(?<![\w.\\])(\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|×|·|\*)\s*10\s*\^\s*"
    r"(?:\{\s*([+-]?\d{1,2})\s*\}|([+-]?\d{1,2}))(?![\w.])"
)
_LAYOUT = re.compile(r"\\left|\\right|\\[!,;: ]|\\\(|\\\)|[$£€]|\\(?=[$£€%])")
_SPACED = re.compile(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?!\d)(?! \d)")
_EXACT = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<top>{_DIGITS})\.?(?:\s*/\s*(?P<bottom>{_DIGITS}))?"
    rf"|\\[dt]?frac\s*{{\s*(?P<frac_top>[+-]?{_DIGITS})\s*}}\s*{{\s*(?P<frac_bottom>{_DIGITS})\s*}}"
    r"|\\[dt]?frac\s*(?P<digit_top>\d)\s*(?P<digit_bottom>\d))\s*(?P<percent>%?)\.?"
)
# A hyphen is a sign where it touches the number and no operand: "is -3" but not "5-3" or "5 - 3".
_IN_TEXT = re.compile(rf"(?:(?<![\w)\]}}%.])-)?[$£€]?{_DIGITS}(?:/{_DIGITS})?%?")
_LONGEST = 1000
"""Characters of the longest number that is parsed; Python limits the digits of longer ones."""


def plain(text: str) -> str:
    """Write full-width digits and typographic signs in ASCII, and scientific notation out."""
    if not text.isascii():
        text = text.translate(_PLAIN)
    if "e" in text or "E" in text:
        text = _SCIENTIFIC.sub(lambda match: f"{Decimal(match.group()):f}", text)
    return _TIMES_TEN.sub(
        lambda match: f"{Decimal(match[1]).scaleb(int(match[2] or match[3])):f}", text
    )


def exact_number(text: str) -> Fraction | None:
    r"""Parse a whole text as a number: integer, decimal, a/b, \frac{a}{b}; with commas, spaces
    between thousands, $ and %.

    Exact: 0.1 is 1/10, and 10% is 1/10. None for any other text.
    """
    if len(text) > _LONGEST:
        return None
    tidy = plain(text).replace("{,}", ",").replace(r"\,", " ").replace("~", " ")
    tidy = _SPACED.sub(lambda match: match[1].replace(" ", ""), _LAYOUT.sub("", tidy)).strip()
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
