"""A rollout while it is being sampled."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlsloth.data.renderer import Renderer
from rlsloth.data.tool_calls import ToolCall
from rlsloth.environments.protocol import Episode, Reply
from rlsloth.errors import UserError, describe_exception
from rlsloth.records import Completion, FinishReason, Message, Rollout


@dataclass(slots=True)
class Trajectory:
    """A rollout that is being sampled; fields without a text are those of Rollout."""

    group: int
    """Index of its prompt."""
    prompt_ids: list[int]
    episode: Episode
    """The environment's side of the conversation."""
    where: str
    """Name of the environment, for messages."""
    tools: Sequence[Any]
    """JSON schemas of the tools that the prompt offers."""
    ended: bool = False
    turn_ids: list[int] = field(default_factory=list)
    """Tokens of the last sampled turn."""
    calls: list[ToolCall] = field(default_factory=list)
    """Tool calls of the last sampled turn."""
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    policy_version: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    finish: FinishReason = "stop"
    text: str = ""
    sampled: int = 0
    """Number of sampled tokens."""
    tool_calls: int = 0
    tool_failures: int = 0
    turn_rewards: list[float] = field(default_factory=list)
    rewarded: bool = False
    """Whether the environment has given a reward."""

    def add_completion(self, completion: Completion, renderer: Renderer) -> None:
        """Append a sampled turn; its tokens carry loss."""
        count = len(completion.token_ids)
        self.turn_ids = completion.token_ids
        self.token_ids += completion.token_ids
        self.loss_mask += [True] * count
        self.logprobs += completion.logprobs
        self.policy_version += [completion.policy_version] * count
        self.finish = completion.finish
        self.sampled += count
        self.text = renderer.decode(completion.token_ids)
        self.messages.append({"role": "assistant", "content": self.text})
        self.turn_rewards.append(0.0)
        calling = self.tools and completion.finish == "stop"
        self.calls = renderer.parse_tool_calls(self.text, self.tools) if calling else []

    def step(self) -> Reply | Awaitable[Reply]:
        """Pass the last turn to the environment. Raises UserError if the environment fails."""
        if self.calls:
            self.messages[-1]["tool_calls"] = [_as_data(call) for call in self.calls]
        try:
            return self.episode.step(self.messages[-1])
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failed("step", error) from error

    async def waited(self, reply: Awaitable[Reply]) -> Reply:
        """Await the reply of an async step. Raises UserError if the environment fails."""
        try:
            return await reply
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failed("step", error) from error

    def earn(self, reward: float | None) -> None:
        """Add a reward to the last turn. Raises UserError unless it is a finite number or None."""
        if reward is None:
            return
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            raise UserError(
                f"{self.where}: the reward of a turn is {reward!r}; return a finite number or None"
            )
        self.rewarded = True
        self.turn_rewards[-1] += float(reward)

    def end(self, finish: FinishReason) -> None:
        """End the rollout. Raises UserError if the environment's ``end`` fails."""
        self.finish, self.ended = finish, True
        try:
            reward = self.episode.end()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failed("end", error) from error
        self.earn(reward)

    def _failed(self, method: str, error: BaseException) -> UserError:
        return UserError(f"{self.where}: {method} raised {describe_exception(error)}")

    def add_context(self, token_ids: list[int]) -> None:
        """Append tokens that the policy did not sample: the environment's messages, as rendered."""
        count = len(token_ids)
        self.token_ids += token_ids
        self.loss_mask += [False] * count
        self.logprobs += [0.0] * count
        self.policy_version += [-1] * count

    def rollout(self) -> Rollout:
        """Return the finished rollout."""
        return Rollout(
            token_ids=self.token_ids,
            loss_mask=self.loss_mask,
            logprobs=self.logprobs,
            policy_version=self.policy_version,
            finish=self.finish,
            text=self.text,
            messages=self.messages,
            tool_calls=self.tool_calls,
            tool_failures=self.tool_failures,
            turn_rewards=self.turn_rewards if self.rewarded else [],
        )


def _as_data(call: ToolCall) -> Message:
    """Return a tool call in TRL's format; the assistant's content keeps the call's text as well."""
    data = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return data if call.error is None else {**data, "error": call.error}
