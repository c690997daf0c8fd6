"""Splitting a formula outside its brackets."""

from __future__ import annotations

import re

_BRACKET = re.compile(
    r"\\[{}]|\\(?:lfloor|lceil|langle|rfloor|rceil|rangle)(?![A-Za-z])|[()\[\]{}]"
)
_OPENING = {"(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\langle"}


def split(text: str, separator: str | re.Pattern[str]) -> list[str]:
    """The parts of a text between separators that no bracket encloses; one part if brackets do
    not match."""
    if isinstance(separator, str):
        if separator not in text:
            return [text]
        separator = re.compile(re.escape(separator))
    found = list(separator.finditer(text))
    if not found:
        return [text]
    depths = _depths(text)
    if depths is None:
        return [text]
    parts, start = [], 0
    for match in found:
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def separators(text: str, separator: re.Pattern[str]) -> list[str]:
    """The separators between the parts of ``split``."""
    depths = _depths(text)
    found = separator.finditer(text)
    return [] if depths is None else [m.group() for m in found if depths[m.start()] == 0]


def enclosed(text: str, opening: str, closing: str) -> bool:
    """Whether the first bracket of a text closes with its last character."""
    if not text.startswith(opening) or not text.endswith(closing):
        return False
    depths = _depths(text)
    inner = range(len(opening), len(text) - len(closing))
    return depths is not None and all(depths[index] > 0 for index in inner)


def _depths(text: str) -> list[int] | None:
    """The number of open brackets at each character; None if they do not match in number."""
    depths = [0] * len(text)
    depth, start = 0, 0
    for match in _BRACKET.finditer(text):
        depths[start : match.start()] = [depth] * (match.start() - start)
        depth += 1 if match.group() in _OPENING else -1
        if depth < 0:
            return None
        depths[match.start() : match.end()] = [max(depth, 1)] * (match.end() - match.start())
        start = match.end()
    depths[start:] = [depth] * (len(text) - start)
    return depths if depth == 0 else None
