"""Held-out questions: their split from the training data, and overlaps with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from rlsloth.errors import UserError
from rlsloth.records import Prompt


def question_text(prompt: Prompt) -> str:
    """The text that identifies a question: all turns but the system's, white space normalised."""
    if isinstance(prompt.messages, str):
        return " ".join(prompt.messages.split())
    turns = (m for m in prompt.messages if m["role"] != "system")
    return "\n".join(f"{m['role']}: {' '.join(m['content'].split())}" for m in turns)


def questions_of(prompts: Iterable[Prompt]) -> list[str]:
    """``question_text`` of each prompt."""
    return [question_text(prompt) for prompt in prompts]


def split_heldout(
    prompts: Sequence[Prompt], heldout: int, seed: int, section: str = "env"
) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into training and held-out ones: ``heldout`` distinct questions are withheld.

    None of them occurs in the first list. The choice depends on seed and texts only, not on the
    order of the rows.
    """
    first = {question_text(prompt): prompt for prompt in reversed(prompts)}
    if heldout >= len(first):
        raise UserError(
            f"--{section}.heldout {heldout} leaves nothing to train on: "
            f"the data has {len(first)} distinct questions"
        )
    ranked = sorted(first, key=lambda text: _digest(f"{seed} {text}"))
    withheld = set(ranked[:heldout])
    train = [prompt for prompt in prompts if question_text(prompt) not in withheld]
    return train, sorted((first[text] for text in withheld), key=lambda prompt: prompt.index)


def overlap_warning(
    train: Sequence[str],
    heldout: Iterable[str],
    items: str = "training prompts",
    metric: str = "accuracy",
) -> str | None:
    """A warning that training questions are among the held-out ones; None where none is.

    Args:
        train, heldout: questions as ``question_text``, or hashes of them.
        items: the training data, in a word or two.
        metric: the figure that the overlap spoils.
    """
    withheld = set(heldout)
    shared = sum(question in withheld for question in train)
    if not shared:
        return None
    return (
        f"{shared} of {len(train)} {items} ask a held-out question: held-out {metric} rewards "
        "memory, too"
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
