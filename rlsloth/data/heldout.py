"""Held-out questions: splitting them off the training data, and finding overlaps with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from rlsloth.errors import UserError
from rlsloth.records import Prompt


def question_text(prompt: Prompt) -> str:
    """Return the text that identifies a question: all turns except the system's.

    White space is normalised.
    """
    if isinstance(prompt.messages, str):
        return " ".join(prompt.messages.split())
    turns = (m for m in prompt.messages if m["role"] != "system")
    return "\n".join(f"{m['role']}: {' '.join(m['content'].split())}" for m in turns)


def questions_of(prompts: Iterable[Prompt]) -> list[str]:
    """List the question of each prompt (``question_text``)."""
    return [question_text(prompt) for prompt in prompts]


def split_heldout(
    prompts: Sequence[Prompt], heldout: int, seed: int, section: str = "env"
) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into training and held-out prompts.

    The choice depends on the seed and the texts, not on the order of the rows.

    Args:
        prompts: all prompts.
        heldout: number of distinct questions to withhold.
        seed: seed of the choice.
        section: section of the configuration with the option ``heldout``, for messages.

    Returns:
        The prompts whose questions are not withheld, and one prompt for each withheld question.

    Raises:
        UserError: all questions would be withheld.
    """
    first = {question_text(prompt): prompt for prompt in reversed(prompts)}
    if heldout >= len(first):
        raise UserError(
            f"--{section}.heldout {heldout} leaves nothing to train on: the dataset has only "
            f"{len(first)} distinct questions; pass a smaller number"
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
    """Make a warning if training data contain held-out questions; None if they do not.

    Args:
        train: questions of the training data (``question_text``), or hashes of them.
        heldout: held-out questions, in the same form.
        items: name of the training data, for the warning.
        metric: name of the held-out figure that the overlap makes too good.
    """
    withheld = set(heldout)
    shared = sum(question in withheld for question in train)
    if not shared:
        return None
    return (
        f"{shared} of {len(train)} {items} contain a held-out question, so that held-out {metric} "
        "also rewards memorising; remove them from one of the two datasets"
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
