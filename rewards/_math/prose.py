"""The answer in a text without marks: after "the answer is", in the last formula, or its last
number with what belongs to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from rlsloth.rewards._math.units import is_plain_unit

CUE = re.compile(
    r"(?:final\s+|correct\s+)?(?:answers?|option|choice)(?:\s+(?:is|are|to\s+(?:the|this|your)\s+\w+\s+is)\b|\s*[:=])\s*:?"
    r"|(?:정답|답)\s*(?:은|:)|(?:答案|答え|結果|结果|解答|正解)\s*(?:是|为|為|は|[:：=])\s*[:：]?|(?:respuesta|réponse|antwort)\s*(?:es|est|ist|:)",
    re.IGNORECASE,
)  # fmt: skip
_COPULA = re.compile(r"(?:是|为|為|は|等于|等於)\s*:?")
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$(?!\d+(?:\.\d+)?\s+[a-z])([^$\n]+?)(?<!\\)\$",
    re.DOTALL,
)
_JOINT = re.compile(r"\s*(?:,|;|,?\s*(?:and|or))\s*$", re.IGNORECASE)
_END = re.compile(r"(?<!\d)[.!?](?=\s|$|\*)|(?<=\d)[.!?](?=\s|$|\*)|[。！？\n]|\bI hope\b")
_CJK = re.compile(r"[぀-ヿ一-鿿가-힯]+")
_OPERATOR = re.compile(r"[-+*/^×·÷±=<>≤≥]|\\(?:times|cdot|pm|div)")
_REASON = re.compile(
    r"\s*(?:,\s*)?(?<![A-Za-z])(?:because|since|as|which|so|but|when|where|if|"
    r"for|after|given|that|by|with|in total)(?![A-Za-z]).*$",
    re.IGNORECASE | re.DOTALL,
)
_DIGIT = re.compile(r"\d")
_EDGE = "*_`\"'“”()[]:;,.!?"
_STOPS = (",", ";", ":", ".", "!", "?")
_NUMBER = re.compile(r"[-+]?\$?\d[\d.,/]*\d|[-+]?\$?\d")
LONGEST = 400
_TAIL = 500


def candidates(text: str) -> Iterator[tuple[str, bool]]:
    """Texts that may be the answer, best first, each with whether only it may count: what a text
    names as its answer is not passed over for another number in it."""
    text = text.strip()
    cue = _last_cue(text)
    if cue is not None:
        rest = text[cue:].lstrip(" *_:\n")
        yield from ((part, True) for part in _after_cue(rest))
        return
    if len(text) <= 80:
        yield text, False
    formula = _last_formula(text)
    if formula is not None:
        yield formula, True
        return
    if _CJK.search(text):
        yield from ((part, False) for part in _between_cjk(text))
    number = last_number(text)
    if number is not None:
        yield number, True


def _last_cue(text: str) -> int | None:
    """The end of the last cue, which is looked for near the end of the text first."""
    for start in (max(0, len(text) - _TAIL), 0):
        ends = [match.end() for match in CUE.finditer(text, start)]
        if ends:
            return ends[-1]
    return None


def _after_cue(rest: str) -> Iterator[str]:
    end = _formula_or_sentence_end(rest)
    sentence = _after_copula(rest[:end])
    formulas = list(_FORMULA.finditer(sentence))
    if formulas and not re.search(r"\d", sentence[: formulas[0].start()]):
        yield _joined(sentence, formulas, forward=True)
        return
    for part in dict.fromkeys((sentence, _REASON.sub("", sentence), _CJK.sub(" ", sentence))):
        if part.strip() and len(part) <= LONGEST:
            yield part
    number = first_number(sentence)
    if number is not None:
        yield number


def _after_copula(sentence: str) -> str:
    """The text after "is" in a sentence such as "The largest $n$ is 34"."""
    if not re.match(r"\W*(?:The|There|So|A|An|It|[A-Z][a-z]+)\b", sentence):
        return sentence
    rest = re.split(r"(?<![A-Za-z])(?:is|are|equals)(?![A-Za-z])", sentence)[-1]
    return rest if re.search(r"[\d$\\]", rest) else sentence


def _formula_or_sentence_end(text: str) -> int:
    """The end of the first sentence, outside of formulas."""
    spans = [match.span() for match in _FORMULA.finditer(text)]
    for match in _END.finditer(text):
        if not any(start <= match.start() < end for start, end in spans):
            return match.start()
    return len(text)


def _last_formula(text: str) -> str | None:
    formulas = list(_FORMULA.finditer(text))
    if not formulas:
        return None
    tail = text[formulas[-1].end() :]
    if _DIGIT.search(tail) and not re.match(r"\s*(?:\\?%|percent|pct)", tail):
        return None  # a number after the last formula
    return _joined(text, formulas, forward=False)


def _joined(text: str, formulas: list[re.Match[str]], forward: bool) -> str:
    """The first or the last formula, and those that commas or words join to it."""
    found = formulas if forward else formulas[::-1]
    parts = [_content(found[0])]
    for one, other in pairwise(found):
        left, right = (one, other) if forward else (other, one)
        if not _JOINT.fullmatch(text[left.end() : right.start()]):
            break
        parts.append(_content(other))
    parts = parts if forward else parts[::-1]
    last = found[len(parts) - 1] if forward else found[0]
    percent = re.match(r"\s*(?:\\?%|percent\b|pct\b)", text[last.end() :])
    return ", ".join(parts) + (r"\%" if percent else "")


def only_formulas(text: str) -> bool:
    """Whether a text is formulas and what joins them: ``$2$, $3$ or $5$``."""
    rest = _FORMULA.sub(" ", text)
    return rest != text and re.fullmatch(r"(?:[\s,.;]|\band\b|\bor\b)*", rest) is not None


def _content(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def _between_cjk(text: str) -> Iterator[str]:
    """The text after the last copula of a sentence without spaces."""
    found = list(_COPULA.finditer(text))
    if found:
        rest = text[found[-1].end() :]
        end = _END.search(rest)
        yield _CJK.sub(" ", rest[: end.start()] if end else rest)


def last_number(text: str) -> str | None:
    """The last number of a text with all that belongs to it: ``3√2`` rather than ``2``."""
    return _number(text, last=True)


def first_number(text: str) -> str | None:
    """The first number of a text with all that belongs to it."""
    return _number(text, last=False)


def _number(text: str, last: bool) -> str | None:
    words = _CJK.sub(" ", text).split()
    with_digit = [index for index, word in enumerate(words) if _DIGIT.search(word)]
    if not with_digit:
        return None
    start = end = with_digit[-1 if last else 0]
    while start > 0 and _joins(words[start - 1], words[start]):
        start -= 1
    while end + 1 < len(words) and _joins(words[end], words[end + 1]):
        end += 1
    if end + 1 < len(words) and not words[end].endswith(_STOPS):
        end += is_plain_unit(words[end + 1].strip(_EDGE))
    start = _start_of_list(words, _start_of_bracket(words, start, end))
    run = " ".join(words[start : end + 1])
    sides = re.split(r"(?<![<>\\!])=", run)
    run = next((side for side in reversed(sides) if _DIGIT.search(side)), run).strip()
    return run.strip("*_`\"'“”:;,!?") or None


def _start_of_bracket(words: list[str], start: int, end: int) -> int:
    """The word with the bracket that the words close: that of ``(2,`` before ``3)``."""
    for first in range(start, max(-1, start - 8), -1):
        run = " ".join(words[first : end + 1])
        if sum(map(run.count, "([")) >= sum(map(run.count, ")]")):
            return first
    return start


def _start_of_list(words: list[str], start: int) -> int:
    """The first word of a list that goes on to a number: ``2, 3 and 4``, ``3 hours and 20``."""
    first = start
    while first > 1 and words[first - 1].lower() in ("and", "or"):
        unit = first > 2 and is_plain_unit(words[first - 2].strip(_EDGE))
        before = first - 3 if unit else first - 2
        if not _NUMBER.fullmatch(words[before]):
            break
        first = before
        while first > 0 and _NUMBER.fullmatch(words[first - 1].removesuffix(",")):
            if not words[first - 1].endswith(","):
                break
            first -= 1
    return first


def _joins(left: str, right: str) -> bool:
    """Whether two neighbouring words belong to one expression."""
    if not left or left.endswith(_STOPS):
        return False
    if _OPERATOR.fullmatch(left) or _OPERATOR.fullmatch(right):
        return bool(_DIGIT.search(left + right) or _OPERATOR.fullmatch(left) or len(left) <= 2)
    if re.fullmatch(r"\d{1,3}(?: \d{3})*", left) and re.fullmatch(r"\d{3}[.,!?]?", right):
        return True
    return bool(re.fullmatch(r"-?\d+", left) and re.fullmatch(r"\d+/\d+[.,!?]?", right))
