"""The final answer in a text: after the reasoning, in a box, in a tag or after ``####``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_THOUGHT_ENDS = re.compile(r"</(?:think|thinking|thought|reasoning)>|◁/think▷", re.IGNORECASE)
_THOUGHT_STARTS = re.compile(r"<(?:think|thinking|thought|reasoning)>|◁think▷", re.IGNORECASE)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"(?<!\\)[{}]")
_MOST_BOXES = 20
"""Boxes, counted from the end, among which parts of the answer are looked for."""

_JOINT = re.compile(
    r"(?:[\s$,;:&()\[\]{}|]|\\[()\[\],;:! ]|\\q?quad|\\text\s*\{"
    r"|(?<![A-Za-z])(?:and|or|und|et|y)(?![A-Za-z])"
    r"|[和或与及、，]|[A-Za-z](?:_\{?\w+\}?)?\s*=)*"
)
"""Text between two boxes that are parts of one answer: ``, and``, or ``y =``."""
_LOOSE_JOINT = re.compile(r"[^.!?\n。]{0,60}\b(?:and|or)\b[^.!?\n。]{0,40}")
_CORRECTION = re.compile(
    r"\b(?:no|not|but|wait|rather|actually|instead|then|so|hence|thus|therefore|finally|sorry|hmm|"
    r"check|correct|wrong|becomes?|gets?|gives?|equals?)\b",
    re.IGNORECASE,
)
_PERCENT_AFTER = re.compile(r"\s*\$?\s*(?:\\?%|percent\b|pct\b)")


@dataclass(frozen=True, slots=True)
class Mark:
    """A part of a text that is marked as the answer."""

    text: str
    start: int
    end: int


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion; for chat messages, that of the last one."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):  # multimodal parts
        content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""


def final_text(text: str) -> str:
    """The text after the reasoning: after the last ``</think>``; reasoning that does not end
    holds no answer."""
    ends = list(_THOUGHT_ENDS.finditer(text))
    text = text[ends[-1].end() :] if ends else text
    start = _THOUGHT_STARTS.search(text)
    return text if start is None else text[: start.start()]


def boxes(text: str) -> list[Mark]:
    r"""The complete ``\boxed{...}`` and ``\fbox{...}`` of a text, by their start; the last few."""
    found = []
    for match in list(_BOX.finditer(text))[-_MOST_BOXES:]:
        depth = 1
        for brace in _BRACE.finditer(text, match.end()):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                content = text[match.end() : brace.start()].strip()
                found.append(Mark(content, match.start(), brace.end()))
                break
    return found


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}`` or ``\fbox{...}``."""
    found = boxes(text)
    return found[-1].text if found else None


def last_tag(text: str, tag: str) -> str | None:
    """The content of the last complete ``<tag>...</tag>``."""
    found = _tags(text, tag)
    return found[-1].text if found else None


def _tags(text: str, tag: str) -> list[Mark]:
    pattern = rf"<{tag}>((?:(?!<{tag}>).)*?)</{tag}>"
    return [
        Mark(match[1].strip(), match.start(), match.end())
        for match in re.finditer(pattern, text, flags=re.DOTALL)
    ]


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last ``####``: GSM8K's final answer."""
    _, hashes, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if hashes else None


def marked_answer(text: str) -> str | None:
    r"""The answer that a text marks as final: in a box or an answer tag, whichever ends last, else
    after ``####``.

    Boxes that are joined by a comma or a word, ``\boxed{1} and \boxed{2}``, are one answer: ``1,
    2``. "" if the only box is not closed: what it would hold is not known. None without a mark.
    Reasoning is not looked at; see ``final_text``.
    """
    text = final_text(text)
    found, tags = boxes(text), _tags(text, "answer")
    if tags and (not found or tags[-1].end > found[-1].end):
        inside = boxes(tags[-1].text)
        return _joined(tags[-1].text, inside) if inside else tags[-1].text
    if found:
        return _joined(text, found)
    hashed = after_hashes(text)
    if hashed:
        return hashed
    return "" if _BOX.search(text) else None


def _joined(text: str, found: list[Mark]) -> str:
    """The last box, and those before it that are parts of the same answer."""
    parts = [_with_percent(text, found[-1])]
    for left, right in zip(reversed(found[:-1]), reversed(found[1:]), strict=True):
        if left.end > right.start or not _is_joint(text[left.end : right.start]):
            break
        part = _with_percent(text, left)
        if part not in parts:
            parts.insert(0, part)
    return ", ".join(parts)


def _is_joint(between: str) -> bool:
    if _JOINT.fullmatch(between):
        return True
    return bool(_LOOSE_JOINT.fullmatch(between)) and not _CORRECTION.search(between)


def _with_percent(text: str, mark: Mark) -> str:
    percent = _PERCENT_AFTER.match(text, mark.end)
    return mark.text + r"\%" if percent and "%" not in mark.text else mark.text
