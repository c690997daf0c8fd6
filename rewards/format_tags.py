"""The think-then-answer format."""

from __future__ import annotations

import re
from typing import Any

from rlsloth.errors import UserError
from rlsloth.scoring.answers import completion_text
from rlsloth.scoring.example import Example


def format_tags(
    completions: list[Any], *, tags: str = "think answer", first_tag_open: bool = False
) -> list[float | None]:
    """1 if the completion is <think>...</think><answer>...</answer> and nothing else, else 0.

    Each tag occurs exactly once, in order, with some text in it; only white space is outside.

    Args:
        tags: The tags' names in order, separated by spaces.
        first_tag_open: The chat template has opened the first tag, so completions start inside it.
    """
    names = tags.split()
    if not names or not all(re.fullmatch(r"[\w-]+", name) for name in names):
        raise UserError(f"reward.params.format_tags.tags: {tags!r} is not a list of tag names")
    start = f"<{names[0]}>" if first_tag_open else ""
    return [float(_matches(start + completion_text(c), names)) for c in completions]


def _matches(text: str, names: list[str]) -> bool:
    blocks = (rf"\s*<{name}>(.*?)</{name}>" for name in names)
    match = re.fullmatch("".join(blocks) + r"\s*", text, flags=re.DOTALL)
    if match is None or not all(block.strip() for block in match.groups()):
        return False
    return all(text.count(mark) == 1 for name in names for mark in (f"<{name}>", f"</{name}>"))


EXAMPLES = (
    Example("<think>2 + 2</think>\n<answer>4</answer>", 1.0, "correct format"),
    Example("<think>2 + 2</think>", 0.0, "no answer"),
    Example("<answer>4</answer><think>2 + 2</think>", 0.0, "wrong order"),
    Example("<think></think><answer>4</answer>", 0.0, "nothing thought"),
    Example("<think>a</think><answer>4</answer><answer>5</answer>", 0.0, "two answers"),
    Example("<think>a</think><answer>4</answer> So 4.", 0.0, "text behind"),
)
