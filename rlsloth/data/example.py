"""A supervised or preference example, and its conversion to a group that can be packed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsloth.data.turns import Answer
from rlsloth.records import Group, Prompt, Rollout

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with one completion, or with a chosen and a rejected completion.

    Token ids are arrays, because a Python object for each of a hundred million tokens would take
    gigabytes.
    """

    index: int
    """Number of the row in the dataset, from 0."""
    question: str
    """Hash of the question (``hash_question``); examples with equal ones are held out together."""
    prompt_ids: Ids
    """[P] token ids of the prompt."""
    answers: tuple[tuple[Ids, Mask], ...]
    """Token ids [L] of each completion, and a mask [L]: True for tokens in the loss."""
    label: bool = True
    """Whether a single completion is desirable (KTO)."""
    reference: tuple[float, ...] | None = None
    """Summed log-prob (nats) of each completion under the starting policy; None until computed."""

    @property
    def longest(self) -> int:
        """Number of tokens of the prompt with its longest completion."""
        return len(self.prompt_ids) + max(len(ids) for ids, _ in self.answers)

    @property
    def packed(self) -> int:
        """Number of tokens of the prompt with all completions, packed together."""
        return len(self.prompt_ids) + sum(len(ids) for ids, _ in self.answers)

    @property
    def tokens(self) -> int:
        """Number of tokens of all completions, each with its prompt: TRL's num_tokens."""
        return sum(len(self.prompt_ids) + len(ids) for ids, _ in self.answers)

    def group(self) -> Group:
        """Convert the example to a group, whose rollouts are the completions, for packing."""
        rollouts = [_rollout(ids.tolist(), mask.tolist()) for ids, mask in self.answers]
        return Group(Prompt(self.index, "", {}), self.prompt_ids.tolist(), rollouts)


def make_example(
    index: int, question: str, answers: Sequence[Answer], *, label: bool = True
) -> Example:
    """Make an example from one answer, or from two answers to the same prompt.

    Args:
        index: number of the row in the dataset, from 0.
        question: text of the question (heldout.question_text).
        answers: the completions, with their prompt.
        label: whether a single completion is desirable.
    """
    arrays = [(np.array(a.token_ids, np.int32), np.array(a.loss_mask, np.bool_)) for a in answers]
    prompt_ids = np.array(answers[0].prompt_ids, np.int32)
    return Example(index, hash_question(question), prompt_ids, tuple(arrays), label)


def hash_question(text: str) -> str:
    """Hash a question's text (heldout.question_text) without regard to white space."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def fingerprint(examples: Iterable[Example]) -> str:
    """Hash all tokens, masks and labels of the examples, in order, with SHA-256."""
    hashed = hashlib.sha256()
    for example in examples:
        for ids, mask in ((example.prompt_ids, None), *example.answers):
            hashed.update(len(ids).to_bytes(8) + ids.tobytes())
            hashed.update(b"" if mask is None else mask.tobytes())
        hashed.update(bytes([example.label]))
    return hashed.hexdigest()


def _rollout(token_ids: list[int], loss_mask: list[bool]) -> Rollout:
    zeros: list[Any] = [0] * len(token_ids)
    return Rollout(token_ids, loss_mask, zeros, zeros, "stop", "", [])
