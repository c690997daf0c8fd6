"""What a rollout engine is: token prefixes in, sampled continuations out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from rlsloth.errors import UserError
from rlsloth.records import Completion, SamplingParams, Weights

BASE_VERSION = -1
"""Version of tokens that no adapter had a part in; no update takes them for the policy's own."""


class Engine(Protocol):
    """Samples from the policy. One implementation a file; the loop does not know which it has."""

    version: int
    """Version of the adapter that samples now."""

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None = None,
        done: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """``n`` continuations of each token prefix, in the order given.

        A prefix is computed once for its ``n`` continuations. The same seed, prefixes and weights
        give the same tokens. A continuation never exceeds ``sampling.max_tokens``; one that reaches
        it without an end token or stop string finishes as ``length``. ``limits`` gives each prefix
        a cap of its own, at most ``sampling.max_tokens``.

        Once ``sampling.cut_tail`` of the call's completions have finished, the others are cut: they
        finish as ``length`` with the tokens they have, or with their first where they have none.

        ``done`` is called once for each prefix, with its number and its ``n`` completions, as soon
        as the last of them has finished, while others are still being sampled.

        Raises:
            UserError: a prefix leaves no room in the model's context.
        """
        ...

    def set_weights(self, weights: Weights) -> None:
        """Sample from these weights from now on, and stamp tokens with their version.

        Raises:
            UserError: the engine cannot take weights of this kind, or has no place for one.
        """
        ...

    def release(self) -> None:
        """Give the memory back that only sampling needs, until ``generate`` takes it again."""
        ...

    def interrupt(self) -> None:
        """From another thread: let ``generate`` fail soon. The engine is then of no use."""
        ...

    def base_model(self) -> AbstractContextManager[None]:
        """Inside, sample from the base without any adapter, and stamp tokens with BASE_VERSION."""
        ...


def most_tokens(prefix: Sequence[int], wanted: int, context: int) -> int:
    """Tokens that may follow a prefix: those wanted, or what the context leaves.

    Raises:
        UserError: it leaves no room.
    """
    room = context - len(prefix)
    if room < 1:
        raise UserError(
            f"a prompt of {len(prefix)} tokens fills the model's context of {context}; shorten it, "
            "drop it, or raise --model.max-context"
        )
    return min(wanted, room)
