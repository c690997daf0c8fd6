"""A penalty on repeated phrases."""

from __future__ import annotations

from typing import Any

from rlsloth.errors import UserError
from rlsloth.scoring.answers import completion_text
from rlsloth.scoring.example import Example


def repetition(completions: list[Any], *, ngram: int = 4) -> list[float | None]:
    """Minus the share of n-grams that repeat an earlier one: 0 for none, towards -1 for a loop.

    -(1 - distinct n-grams / n-grams) over lower-case words separated by white space (the repetition
    penalty of Yeo et al. 2025, "Demystifying long chain-of-thought reasoning"). 0 when the
    completion is shorter than n words.

    Args:
        ngram: Words of a phrase.
    """
    if ngram < 1:
        raise UserError("reward.params.repetition: ngram must be at least 1")
    return [
        _penalty(completion_text(completion).lower().split(), ngram) for completion in completions
    ]


def _penalty(words: list[str], ngram: int) -> float:
    phrases = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return len(set(phrases)) / len(phrases) - 1.0 if phrases else 0.0


EXAMPLES = (
    Example("one two three four five six", 0.0, "nothing repeats"),
    Example("so it is so it is so it is", -0.5, "3 distinct of 6 phrases"),
    Example("no no no no no no no no", -0.8, "1 distinct of 5 phrases"),
    Example("too short", 0.0, "shorter than a phrase"),
)
