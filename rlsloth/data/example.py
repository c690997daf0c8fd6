"""One example to learn from, and the group that it is packed as."""

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
    """A prompt with an answer, or with a chosen and a rejected one. Arrays, since a data set of a
    hundred million tokens must not be as many Python objects."""

    index: int
    """Row in the data."""
    question: str
    """Hash of the question: examples with the same one are held out together."""
    prompt_ids: Ids
    answers: tuple[tuple[Ids, Mask], ...]
    """Token ids and what of them is learnt."""
    label: bool = True
    """Whether a single answer is a good one."""
    reference: tuple[float, ...] | None = None
    """Summed log-probs of the answers under the starting policy, where they are computed ahead."""

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(self.prompt_ids) + max(len(ids) for ids, _ in self.answers)

    @property
    def packed(self) -> int:
        """Tokens of the prompt with all answers, which a micro-batch holds together."""
        return len(self.prompt_ids) + sum(len(ids) for ids, _ in self.answers)

    @property
    def tokens(self) -> int:
        """Tokens of the answers, each with its prompt, as TRL counts them in num_tokens."""
        return sum(len(self.prompt_ids) + len(ids) for ids, _ in self.answers)

    def group(self) -> Group:
        """The example in the form that is packed: answers are rollouts."""
        rollouts = [_rollout(ids.tolist(), mask.tolist()) for ids, mask in self.answers]
        return Group(Prompt(self.index, "", {}), self.prompt_ids.tolist(), rollouts)


def make_example(
    index: int, question: str, answers: Sequence[Answer], *, label: bool = True
) -> Example:
    """An example of one answer, or of two to the same prompt."""
    arrays = [(np.array(a.token_ids, np.int32), np.array(a.loss_mask, np.bool_)) for a in answers]
    prompt_ids = np.array(answers[0].prompt_ids, np.int32)
    return Example(index, hash_question(question), prompt_ids, tuple(arrays), label)


def hash_question(text: str) -> str:
    """Hash of a question (heldout.question_text): white space does not count."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of every token, what is learnt of them, and the order."""
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
