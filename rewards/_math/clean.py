r"""One notation for what can be written in several: Unicode, markdown, spacing, thousands, mixed
numbers, repeating decimals. Nothing that carries a meaning is dropped."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from rlsloth.rewards._math.notation import (
    LOWERED,
    RAISED,
    SUBSCRIPTS,
    SUPERSCRIPTS,
    UNICODE,
    VULGAR,
)
from rlsloth.scoring.figures import plain

_EN_DASH = re.compile(r"(?<![\w)}])\s*–\s*(?=[\d\\(.])")

_PERCENT = re.compile(
    r"(?<=[\d})])\s*(?:\\text\s*\{\s*)?(?:percent(?:age)?|per cent|pct)\b\.?(?:\s*\})?"
)
_REPLACED: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\(?:left|right|(?:big|Big|bigg|Bigg)[lr]?)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\(?:(?:display|text)style|(?:no)?limits|bf|rm|(?:math)?strut)(?![A-Za-z])"), ""),
    (re.compile(r"\\[hv](?:space|phantom)\s*\*?\{[^{}]*\}"), " "),
    (re.compile(r"\\(?:[,;:> ]|q?quad|enspace|thinspace|medspace|thickspace)|~|&nbsp;"), " "),
    (re.compile(r"\\!\s*"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\sqrt\s*(\d)(?!\d)"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:dbinom|tbinom)(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\{([^{}]+)\\choose(?![A-Za-z])([^{}]+)\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\{([^{}]+)\\over(?![A-Za-z])([^{}]+)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(?:math(?:rm|it)|text(?:rm|it)?|operatorname)\s*\{\s*([eidEI])\s*\}"), r" \1 "),
    (re.compile(r"\{\s*\\rm\s+([ei])\s*\}"), r" \1 "),
    (re.compile(r"\\(?:mathrm|operatorname)\*?\s*\{\s*(lg|ln|log|sin|cos|tan|cot|sec|csc|arcsin|arccos|"
                r"arctan|sinh|cosh|tanh|gcd|lcm|max|min|exp)\s*\}"), r"\\\1 "),
    (re.compile(r"\\leq(?:slant)?(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\geq(?:slant)?(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"<\s*=|=\s*<"), r"\\le "),
    (re.compile(r">\s*="), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])|!="), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:varnothing|empty)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:dots[cbmio]?|cdots)(?![A-Za-z])|\.{3,}"), r"\\ldots "),
    (re.compile(r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])"), "|"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lbrack|rbrack)(?![A-Za-z])"), lambda m: "[" if "lb" in m[0] else "]"),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])|\^\s*\{?\s*\\text\{o\}\s*\}?"),
     r"^\\circ "),
    (re.compile(r"\\mbox(?![A-Za-z])|\\text(?:rm|bf|it|normal|sf|tt|sc)(?![A-Za-z])"), r"\\text"),
    (re.compile(r"\\(?:boldsymbol|bm|pmb)(?![A-Za-z])"), r"\\mathbf"),
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}|\\checkmark(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:mathbf|bold|underline|mathit)\s*\{([^{}A-Za-z]*)\}"), r"{\1}"),
    (re.compile(r"^\s*=(?![=>])"), ""),
    (re.compile(r"\\text\s*\{\s*\}"), " "),
    (_PERCENT, r"\\%"),
    (re.compile(r"\\sqrt\s*\((?=[^()]*\))([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\s*\{\s*,\s*\}\s*"), ","),
    (re.compile(r"\s+"), " "),
]  # fmt: skip
_AMOUNT = r"(-?\d[\d,]*(?:\.\d+)?(?:\s+(?:thousand|million|billion|trillion)\b)?)"
_MONEY_SIGNS = set("£€¥₹")
_MONEY = [
    (re.compile(rf"{sign}\s*{_AMOUNT}" if before else rf"{_AMOUNT}\s*{sign}"), word)
    for sign, word in (
        (r"(?:\\?\$)", "dollars"),
        ("£", "sterling"),
        ("€", "euros"),
        ("¥", "yen"),
        ("₹", "rupees"),
    )
    for before in (True, False)
]
_SIMPLE = re.compile(r"[\w .,/+\-*=()%^]*")
_MARKDOWN = re.compile(r"\*\*|__(?=\S)|(?<=\S)__|`")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_SPACED = re.compile(r"(?<![\d.,^_{])(?<!\d )([1-9]\d{0,2}(?: \d{3})+)(?!\d)(?! \d)")
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar)\s*(?:\{\s*(\d+)\s*\}|(\d))"
    r"|((?:\\dot\s*(?:\{\s*\d\s*\}|\d)\s*\d*)+)|\((\d+)\))(?!\d)"
)
_MIXED = re.compile(
    r"(?<![\d.}^_/])(\d+) ?\\frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d)(?!\d))"
)
_MIXED_PLAIN = re.compile(r"(?<![\d.}^_/])(?<!\d )(\d+) +(\d+) ?/ ?(\d+)(?![\d.])")
_MIXED_DASH = re.compile(r"(?<![\d.}^_/])(\d+)-(\d+)/(\d+)(?![\d.])")
_DIFFERENTIAL = re.compile(r"\\frac\s*\{\s*d ?([A-Za-z])\s*\}\s*\{\s*d ?([A-Za-z])\s*\}")
_GLUED_FRACTION = re.compile(
    r"(?<![\w.}/^])(\d+)/(\d+)(?= [A-Za-z\\(]|\\|[A-Za-z(])(?! ?\\(?:times|cdot))"
)


def clean(text: str) -> str:
    r"""The text in one notation: ASCII and LaTeX commands, ``\frac{a}{b}`` for mixed numbers and
    repeating decimals, digits without separators; no markdown, delimiters of formulas or spacing.
    """
    text = plain(text)
    if "\\\\" in text:
        text = _rows(text)
    text = _money(text)
    if not text.isascii():
        text = _unicode(text)
    if "**" in text and not re.search(r"(?:^|[\s:(])\*\*", text):
        # Python's power; bold text begins after a space.
        text = re.sub(r"(?<=[\w)}])\*\*(?=[\w(\\-])", "^", text)
    text = _MARKDOWN.sub("", text)
    if "..." in text or not _SIMPLE.fullmatch(text):
        for pattern, new in _REPLACED:
            text = pattern.sub(new, text)
    return _numbers(_without_ends(_PERCENT.sub(r"\\%", text)))


def _rows(text: str) -> str:
    r"""Line breaks of matrices as ``\cr``; elsewhere a doubled backslash is one of a JSON text."""
    if "\\begin" in text:
        return re.sub(r"\\\\(?!begin|end)(?:\[[^\]]*\])?", r" \\cr ", text).replace("\\\\", "\\")
    return re.sub(r"\\\\(?=[A-Za-z({\[)}\],;%$])", r"\\", text)


def _money(text: str) -> str:
    """Signs of money as words behind the number; other ``$`` are delimiters of formulas."""
    if "$" not in text and _MONEY_SIGNS.isdisjoint(text):
        return text
    single = text.count("$") - text.count("\\$") == 1
    for pattern, word in _MONEY:
        if word != "dollars" or single or "\\$" in text:
            text = pattern.sub(rf"\1 \\text{{ {word}}} ", text)
    return text.replace("\\$", " ").replace("$", " ")


def _unicode(text: str) -> str:
    for sign, (top, bottom) in VULGAR.items():
        if sign in text:
            text = re.sub(rf"(\d) ?{sign}", rf"\1 \\frac{{{top}}}{{{bottom}}}", text)
            text = text.replace(sign, rf"\frac{{{top}}}{{{bottom}}}")
    text = re.sub(r"(?<=\d)\s*([ckm]?m|ft|in)(?=[²³])", r" \\text{ \1}", text)
    text = RAISED.sub(lambda m: f"^{{{m[0].translate(SUPERSCRIPTS)}}}", text)
    text = LOWERED.sub(lambda m: f"_{{{m[0].translate(SUBSCRIPTS)}}}", text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?)", r"\\sqrt{\1}", text)
    return _EN_DASH.sub("-", text).translate(UNICODE)


def _without_ends(text: str) -> str:
    """The text without spaces, quotes and full stops around it."""
    text = text.strip(' \t\n"*;')
    while text.endswith((".", ",", "!", ";")) and not text.endswith(("\\!", "\\;", "\\,")):
        if text.endswith("!") and re.search(r"[\w)}]!$", text):
            break  # a factorial
        text = text[:-1].rstrip(' "*')
    return text


def _numbers(text: str) -> str:
    if not any(character.isdigit() for character in text):
        return text.strip()
    if "," in text and not re.search(r"[(\[]|\\\{", text):
        text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    if " " in text:
        text = _SPACED.sub(lambda m: m[1].replace(" ", ""), text)
    if "." in text:
        text = _REPEATING.sub(_repeating, text)
    text = _DIFFERENTIAL.sub(r"\\mathbf{d\1d\2}", text)
    if "\\frac" in text:
        text = _MIXED.sub(lambda m: _mixed(m[1], m[2] or m[4], m[3] or m[5], m[0]), text)
    if "/" in text:
        text = _MIXED_PLAIN.sub(lambda m: _mixed(m[1], m[2], m[3], m[0]), text)
        text = _MIXED_DASH.sub(lambda m: _mixed(m[1], m[2], m[3], m[0]), text)
        text = _GLUED_FRACTION.sub(r"\\frac{\1}{\2}", text)
    return text.strip()


def _mixed(whole: str, top: str, bottom: str, written: str) -> str:
    if len(written) > 60 or int(bottom) == 0 or int(top) >= int(bottom):
        return written
    return _fraction(int(whole) + Fraction(int(top), int(bottom)))


def _repeating(match: re.Match[str]) -> str:
    whole, start, *forms = match.groups()
    period = next(form for form in forms if form)
    if period.startswith("\\dot"):
        period = "".join(re.findall(r"\d", period))
    if len(match[0]) > 60:
        return match[0]
    nines = 10 ** len(period) - 1
    shift = 10 ** len(start)
    return _fraction(
        Fraction(int(whole + start or "0"), shift) + Fraction(int(period), nines * shift)
    )


def _fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
