"""Sampling unscored groups: turn by turn, until the environment or a limit ends each rollout."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from rlsloth.data.renderer import Renderer
from rlsloth.data.tool_calls import ToolCall
from rlsloth.environments.protocol import Environment, Episode, Reply
from rlsloth.errors import UserError, describe_exception
from rlsloth.records import (
    Completion,
    FinishReason,
    Group,
    Message,
    Prompt,
    Rollout,
    SamplingParams,
)
from rlsloth.rollout.engine import Engine
from rlsloth.seeding import derive_seed


@dataclass(slots=True)
class _Trajectory:
    """A rollout that is still growing."""

    group: int
    prompt_ids: list[int]
    episode: Episode
    where: str
    """The environment, for messages."""
    has_tools: bool
    ended: bool = False
    turn_ids: list[int] = field(default_factory=list)
    """Tokens of the last sampled turn."""
    calls: list[ToolCall] = field(default_factory=list)
    """The tool calls in it."""
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    policy_version: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    finish: FinishReason = "stop"
    text: str = ""
    sampled: int = 0
    tool_calls: int = 0
    tool_failures: int = 0
    turn_rewards: list[float] = field(default_factory=list)
    rewarded: bool = False
    """Whether the environment gave any reward."""

    def add_completion(self, completion: Completion, renderer: Renderer) -> None:
        """Append sampled tokens, which carry loss."""
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
        calling = self.has_tools and completion.finish == "stop"
        self.calls = renderer.parse_tool_calls(self.text) if calling else []

    def step(self) -> Reply | Awaitable[Reply]:
        """Hand the last turn to the environment. Raises UserError if it fails."""
        if self.calls:
            self.messages[-1]["tool_calls"] = [_as_data(call) for call in self.calls]
        try:
            return self.episode.step(self.messages[-1])
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failed("step", error) from error

    async def waited(self, reply: Awaitable[Reply]) -> Reply:
        """The reply of an async step. Raises UserError if it fails."""
        try:
            return await reply
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failed("step", error) from error

    def earn(self, reward: float | None) -> None:
        """Add a reward to the last turn. Raises UserError for one that is no finite number."""
        if reward is None:
            return
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            raise UserError(f"{self.where}: its reward is {reward!r}, not a finite number")
        self.rewarded = True
        self.turn_rewards[-1] += float(reward)

    def end(self, finish: FinishReason) -> None:
        """End the rollout. Raises UserError if the environment fails at it."""
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
        """Append tokens the policy did not choose: the environment's messages and template glue."""
        count = len(token_ids)
        self.token_ids += token_ids
        self.loss_mask += [False] * count
        self.logprobs += [0.0] * count
        self.policy_version += [-1] * count

    def rollout(self) -> Rollout:
        """The finished record."""
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


def collect(
    engine: Engine,
    renderer: Renderer,
    env: Environment,
    prompts: Sequence[Prompt],
    n: int,
    sampling: SamplingParams,
    *,
    max_turns: int,
    context: int,
    on_group: Callable[[Group], None] | None = None,
) -> list[Group]:
    """Sample ``n`` rollouts of each prompt, in order, unscored.

    ``sampling.max_tokens`` bounds what the policy samples over all turns of a rollout. A rollout
    finishes as ``length`` when the environment goes on with no turn or token left, or when its
    messages leave no room in the model's ``context``. ``on_group`` is called with each group as
    soon as all of its rollouts have ended, while the rest are still being sampled. Async steps of
    one turn run concurrently, once it is sampled.
    """
    prefixes = [renderer.prompt_ids(prompt) for prompt in prompts]
    started = [
        [_start(env, g, prompts[g], prefix) for _ in range(n)] for g, prefix in enumerate(prefixes)
    ]
    groups: dict[int, Group] = {}
    waiting: list[tuple[_Trajectory, Awaitable[Reply]]] = []
    limits = _Limits(sampling.max_tokens, context)

    def close(g: int) -> None:
        if g not in groups and all(t.ended for t in started[g]):
            groups[g] = Group(prompts[g], prefixes[g], [t.rollout() for t in started[g]])
            if on_group is not None:
                on_group(groups[g])

    def took_turn(trajectory: _Trajectory, completion: Completion, last: bool) -> None:
        trajectory.add_completion(completion, renderer)
        late = _advance(trajectory, renderer, limits, last)
        if late is not None:
            waiting.append((trajectory, late))
        close(trajectory.group)

    pending = [t for group in started for t in group]
    with ExitStack() as stack:
        # In a thread of its own, since a notebook's thread runs an event loop already.
        thread = stack.enter_context(ThreadPoolExecutor(1, "environment"))
        runner = asyncio.Runner()
        stack.callback(lambda: thread.submit(runner.close).result())
        for turn in range(max_turns):
            last = turn + 1 == max_turns
            _sample(engine, pending, n, sampling, turn, partial(took_turn, last=last))
            late = [t.waited(reply) for t, reply in waiting]
            replies = thread.submit(runner.run, _together(late)).result() if late else []
            for (trajectory, _), reply in zip(waiting, replies, strict=True):
                _read(trajectory, reply, renderer, limits, last)
                close(trajectory.group)
            waiting.clear()
            pending = [t for t in pending if not t.ended]
            if not pending:
                break
    return [groups[g] for g in range(len(prompts))]


def _start(env: Environment, group: int, prompt: Prompt, prompt_ids: list[int]) -> _Trajectory:
    where = f"environment {env.name}"
    return _Trajectory(group, prompt_ids, env.start(prompt), where, bool(prompt.tools))


@dataclass(frozen=True, slots=True)
class _Limits:
    """Limits of a rollout, in tokens."""

    sampled: int
    context: int


async def _together(replies: Sequence[Awaitable[Reply]]) -> list[Reply]:
    return await asyncio.gather(*replies)


def _advance(
    trajectory: _Trajectory, renderer: Renderer, limits: _Limits, last: bool
) -> Awaitable[Reply] | None:
    """Take a sampled turn to the environment, and return its reply if that is still to come."""
    if trajectory.finish == "length":
        trajectory.end("length")
    elif trajectory.calls and (last or trajectory.sampled >= limits.sampled):
        trajectory.end("length")  # nobody would read the tools' answers
    else:
        reply = trajectory.step()
        if inspect.isawaitable(reply):
            return reply
        _read(trajectory, reply, renderer, limits, last)
    return None


def _read(
    trajectory: _Trajectory, reply: Reply, renderer: Renderer, limits: _Limits, last: bool
) -> None:
    """Append the environment's messages, or end the rollout if it cannot go on."""
    trajectory.earn(reply.reward)
    if reply.done:
        trajectory.end("stop")
        return
    if last or trajectory.sampled >= limits.sampled:
        trajectory.end("length")
        return
    messages = list(reply.messages)
    if not messages:
        raise UserError(f"{trajectory.where}: step returned no message, but is not done")
    trajectory.tool_calls += sum(message["role"] == "tool" for message in messages)
    trajectory.tool_failures += reply.tool_failures
    trajectory.messages += messages
    glue = renderer.reply_ids(trajectory.turn_ids, messages)
    if len(trajectory.prompt_ids) + len(trajectory.token_ids) + len(glue) >= limits.context:
        trajectory.end("length")
    else:
        trajectory.add_context(glue)


def _as_data(call: ToolCall) -> Message:
    """A call in TRL's form; the assistant's content keeps the text it was read from."""
    data = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return data if call.error is None else {**data, "error": call.error}


def _sample(
    engine: Engine,
    pending: Sequence[_Trajectory],
    n: int,
    sampling: SamplingParams,
    turn: int,
    took_turn: Callable[[_Trajectory, Completion], None],
) -> None:
    """Sample one turn of each pending rollout; the first is sampled ``n`` times a prompt."""
    share = n if turn == 0 else 1

    def done(i: int, completions: list[Completion]) -> None:
        for trajectory, completion in zip(
            pending[i * share : (i + 1) * share], completions, strict=True
        ):
            took_turn(trajectory, completion)

    if turn == 0:
        engine.generate([t.prompt_ids for t in pending[::n]], n, sampling, done=done)
        return
    engine.generate(
        [t.prompt_ids + t.token_ids for t in pending],
        1,
        replace(sampling, seed=derive_seed(sampling.seed, "turn", turn), cut_tail=1.0),
        limits=[sampling.max_tokens - t.sampled for t in pending],
        done=done,
    )
