"""The protocol of environments: prompts, and episodes that reply to the policy turn by turn."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rlsloth.data.reading import Reading
from rlsloth.records import Message, Prompt

GENERATED = "generated"
"""Source of an environment that makes its own prompts and reads no dataset."""


Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Declaration:
    """Facts of an environment that are known before its prompts are read."""

    single_turn: bool = False
    """Whether one completion ends every rollout."""
    generates: bool = False
    """Whether it makes its own prompts and reads no data."""


def declare(*, single_turn: bool = False, generates: bool = False) -> Callable[[Made], Made]:
    """Declare facts of an environment on the function or class that makes it, for `rlsloth plan`,
    which loads no data from a hub."""

    def mark(make: Made) -> Made:
        make.declaration = Declaration(single_turn, generates)  # type: ignore[attr-defined]
        return make

    return mark


@dataclass(frozen=True, slots=True)
class Reply:
    """Reply of an environment to one assistant turn."""

    messages: Sequence[Message] = ()
    """Next messages, of role ``tool`` or ``user``; at least one unless ``done``."""
    done: bool = False
    """Whether the rollout ends here; ``messages`` are then dropped, since no turn follows."""
    reward: float | None = None
    """Reward of this turn; None: no reward. A rollout without any reward is not scored."""
    tool_failures: int = 0
    """Number of tool messages that report a failed call."""


class Episode:
    """One rollout in an environment; subclass it and write ``step``."""

    def step(self, message: Message) -> Reply | Awaitable[Reply]:
        """Reply to the assistant turn that was just sampled; may be ``async``.

        ``message`` has ``role`` and ``content`` and, if the prompt offers tools and the turn calls
        some, ``tool_calls``; a malformed call has a key ``error``. Not called for a turn that a
        limit cut short, nor for tool calls in the last turn that the limits allow.
        """
        raise NotImplementedError

    def end(self) -> float | None:
        """Return a final reward, added to the last turn's, when the rollout ends for any reason."""
        return None


class SingleTurnEpisode(Episode):
    """Episode that ends with the first completion."""

    def step(self, message: Message) -> Reply:
        """End the rollout."""
        return Reply(done=True)


class Environment(Protocol):
    """Prompts, and an episode for each rollout of a prompt."""

    @property
    def name(self) -> str:
        """The name as configured."""
        ...

    @property
    def train(self) -> Sequence[Prompt]:
        """Prompts to learn from."""
        ...

    @property
    def heldout(self) -> Sequence[Prompt]:
        """Prompts for evaluation."""
        ...

    @property
    def default_rewards(self) -> tuple[str, ...]:
        """Rewards to use when ``rewards`` in the configuration is empty."""
        ...

    @property
    def single_turn(self) -> bool:
        """Whether every rollout ends with its first completion; the memory plan depends on it."""
        ...

    @property
    def source(self) -> str:
        """GENERATED, or the file, folder or hub id of the dataset that the prompts come from."""
        ...

    def start(self, prompt: Prompt) -> Episode:
        """Begin the episode of one rollout of a prompt."""
        ...


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """Environment of prompts with one completion each."""

    name: str
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    default_rewards: tuple[str, ...] = ()
    single_turn: bool = True
    source: str = GENERATED
    reading: Reading | None = None
    """Findings about the dataset, which a run prints; None if it reads none."""

    def start(self, prompt: Prompt) -> Episode:
        """Begin an episode of one turn."""
        return SingleTurnEpisode()
