"""The protocol of rollout engines: token prefixes in, sampled completions out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch

from rlsloth.config import RolloutConfig
from rlsloth.data.renderer import Renderer
from rlsloth.errors import UserError
from rlsloth.memory.workload import EngineMemory, Request, Sampling
from rlsloth.policy.policy import Policy
from rlsloth.records import Completion, SamplingParams, Weights
from rlsloth.run.run import Run

BASE_VERSION = -1
"""Version of tokens that the base model sampled; updates refuse to train on them."""


class Engine(Protocol):
    """Samples from the policy; loops use every engine in the same way."""

    version: int
    """Version of the weights in use."""
    max_sequences: int
    """Largest number of completions that are decoded at once."""

    def generate(
        self,
        prefixes: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        limits: Sequence[int] | None = None,
        done: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample ``n`` completions of each prefix.

        A prefix is computed once for its ``n`` completions. The same seed, prefixes and weights
        give the same tokens. A completion that reaches its largest number of tokens without an end
        token or stop string finishes as ``length``. Once the fraction ``sampling.cut_tail`` of the
        call's completions has finished, the rest are cut: they finish as ``length`` with the tokens
        they have, or with their first token if they have none.

        Args:
            prefixes: token ids of each prompt, or of a prompt with earlier turns.
            n: completions of each prefix.
            sampling: parameters of sampling.
            limits: largest number of tokens for each prefix, at most ``sampling.max_tokens``.
            done: called once for each prefix, with its index and its ``n`` completions, as soon as
                the last of them has finished, while other prefixes are still being sampled.

        Returns:
            The completions of each prefix, in the order of ``prefixes``.

        Raises:
            UserError: a prefix fills the model's context.
        """
        ...

    def set_weights(self, weights: Weights) -> None:
        """Sample from these weights from now on, and stamp tokens with their version.

        Raises:
            UserError: the engine cannot sample from weights of this kind, or from one of them.
        """
        ...

    def release(self) -> None:
        """Free the memory that only sampling needs; ``generate`` allocates it again."""
        ...

    def interrupt(self) -> None:
        """Make ``generate`` fail, from another thread. The engine cannot be used afterwards."""
        ...

    def base_model(self) -> AbstractContextManager[None]:
        """Sample from the base model without an adapter inside the context.

        Tokens are stamped with BASE_VERSION.
        """
        ...


@dataclass(frozen=True, slots=True)
class Opening:
    """Arguments for opening an engine: the run and its parts."""

    request: Request
    """The run as the memory plan takes it."""
    sampling: Sampling
    """The request's sampling."""
    policy: Policy
    """The loaded policy, whose weights the engine samples from."""
    renderer: Renderer
    """Turns messages into tokens, and knows the tokens that end a completion."""
    run: Run
    """For messages."""
    stack: ExitStack
    """Closes the engine when it is closed."""
    context: int
    """Tokens of the longest prompt with its completion that the engine will see."""
    temperatures: tuple[float, ...]
    """Temperatures that the engine will sample with."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """A rollout engine's entry in the table of rlsloth.rollout.engines."""

    memory: EngineMemory
    """Its name and its memory."""
    open: Callable[[Opening], Engine]
    """Starts the engine on the policy's weights. Raises UserError if it cannot sample from this
    policy; its memory is free once that error is garbage."""
    why_not: Callable[[str], str] = lambda _: ""
    """Returns why ``auto`` does not choose it on a type of device (cpu, cuda); empty if it may."""
    why: str = ""
    """Reason for ``auto`` to choose it, shown to the user."""
    preload: Callable[[torch.device, RolloutConfig], None] = lambda *_: None
    """Imports libraries that take seconds; called in parallel with other work."""
    kv_caches: frozenset[str] = frozenset({"auto"})
    """Values of ``rollout.kv_cache`` that it supports."""
    supports_overlap: bool = False
    """Whether it samples while an update runs (``rollout.overlap``)."""
    supports_dora: bool = False
    """Whether it computes with adapters that learn magnitudes (``lora.dora``)."""

    @property
    def name(self) -> str:
        """The value of ``rollout.engine``."""
        return self.memory.name


def most_tokens(prefix: Sequence[int], wanted: int, context: int) -> int:
    """Return how many tokens may follow a prefix: ``wanted``, or fewer if the context is shorter.

    Raises:
        UserError: the prefix fills the context.
    """
    room = context - len(prefix)
    if room < 1:
        raise UserError(
            f"a prompt of {len(prefix)} tokens fills the model's context of {context} tokens; "
            "shorten or remove the prompt, or raise --model.max-context"
        )
    return min(wanted, room)
