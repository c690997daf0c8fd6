"""The protocol of environments: prompts, and episodes that answer the policy turn by turn."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlsloth.records import Message, Prompt

GENERATED = "generated"
"""The source of an environment that makes its own prompts and reads no data."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An environment's answer to one assistant turn."""

    messages: Sequence[Message] = ()
    """The next messages, of role ``tool`` or ``user``; at least one unless ``done``."""
    done: bool = False
    """Whether the rollout ends here; ``messages`` are then dropped, since nothing reads them."""
    reward: float | None = None
    """Reward earned by this turn; None where the turn earns nothing that is counted."""
    tool_failures: int = 0
    """Tool messages that report a failed call."""


class Episode:
    """One rollout in an environment; subclass it and write ``step``."""

    def step(self, message: Message) -> Reply | Awaitable[Reply]:
        """Answer the assistant turn that was just sampled; may be ``async``.

        ``message`` has ``role`` and ``content`` and, where the prompt offers tools and the turn
        calls some, ``tool_calls``; a malformed call has a key ``error``. Turns that a limit cut
        short are not stepped, nor are tool calls that no turn is left to read the answer of.
        """
        raise NotImplementedError

    def end(self) -> float | None:
        """Return a last reward once the rollout has ended, however it ended; None: no reward."""
        return None


class SingleTurnEpisode(Episode):
    """An episode that the first completion ends."""

    def step(self, message: Message) -> Reply:
        """End the rollout."""
        return Reply(done=True)


class Environment(Protocol):
    """Prompts, and an episode for each rollout of one."""

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
        """Rewards used when the configuration names none."""
        ...

    @property
    def single_turn(self) -> bool:
        """Whether one completion ends every rollout; memory is planned by it."""
        ...

    @property
    def source(self) -> str:
        """GENERATED, or the file, folder or hub id that the prompts are read from."""
        ...

    def start(self, prompt: Prompt) -> Episode:
        """Begin the episode of one rollout of a prompt."""
        ...


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """Prompts whose first completion ends the rollout."""

    name: str
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    default_rewards: tuple[str, ...] = ()
    single_turn: bool = True
    source: str = GENERATED

    def start(self, prompt: Prompt) -> Episode:
        """Begin an episode of one turn."""
        return SingleTurnEpisode()
