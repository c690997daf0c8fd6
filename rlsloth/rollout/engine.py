"""Rollout engines: token prefixes in, sampled continuations out."""

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
"""Version of tokens sampled without any adapter; no update takes them for the policy's own."""


class Engine(Protocol):
    """Sample from the policy; a loop does not know which engine it has."""

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


@dataclass(frozen=True, slots=True)
class Opening:
    """The run that an engine is opened for."""

    request: Request
    """The run as the memory plan takes it."""
    sampling: Sampling
    """The request's sampling."""
    policy: Policy
    renderer: Renderer
    run: Run
    stack: ExitStack
    """Closes the engine."""
    context: int
    """Tokens of the longest prompt with its completion that the engine will see."""
    temperatures: tuple[float, ...]
    """Temperatures that the engine will sample with."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """A rollout engine as the table in rlsloth.rollout.engines has it."""

    memory: EngineMemory
    """Its name and its memory."""
    open: Callable[[Opening], Engine]
    """Start it on the policy's weights. Raises UserError where it cannot sample from this policy;
    nothing of it then stays in memory once the error is dropped."""
    why_not: Callable[[str], str] = lambda _: ""
    """Reason why ``auto`` leaves it out on this type of device (cpu, cuda), empty where it may be
    chosen."""
    why: str = ""
    """Reason why ``auto`` chooses it where nothing speaks against it."""
    preload: Callable[[torch.device, RolloutConfig], None] = lambda *_: None
    """Import what takes seconds, while something else is waited for."""
    kv_caches: frozenset[str] = frozenset({"auto"})
    """Values of ``rollout.kv_cache`` that it has."""
    supports_overlap: bool = False
    """Whether it samples while an update runs (``rollout.overlap``)."""

    @property
    def name(self) -> str:
        """The value of ``rollout.engine``."""
        return self.memory.name


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
