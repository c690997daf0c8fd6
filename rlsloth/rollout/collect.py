"""Collecting unscored groups: turn by turn, until the environment or a limit ends a rollout."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from rlsloth.data.renderer import Renderer, refuse_beyond
from rlsloth.environments.protocol import Environment, Reply
from rlsloth.errors import UserError
from rlsloth.records import Completion, Group, Message, Prompt, SamplingParams
from rlsloth.rollout.engine import Engine
from rlsloth.rollout.trajectory import Trajectory
from rlsloth.seeding import derive_seed


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
    embeddings: int | None = None,
    on_group: Callable[[Group], None] | None = None,
) -> list[Group]:
    """Sample ``n`` unscored rollouts of each prompt, in the order of ``prompts``.

    A rollout finishes as ``length`` when the environment continues although no turn or token is
    left, or when its messages fill the context. Async steps of one turn run concurrently.

    Args:
        sampling: ``max_tokens`` bounds the sampled tokens of a rollout over all its turns.
        max_turns: largest number of sampled turns.
        context: largest number of tokens of a prompt with its rollout.
        embeddings: number of the model's embeddings; None if it is not known.
        on_group: called with each group once all its rollouts have ended, while others go on.

    Raises:
        UserError: the environment fails or uses a token without embedding, or a prompt is too long.
    """
    prefixes = [renderer.prompt_ids(prompt) for prompt in prompts]
    started = [_start(env, g, prompts[g], prefix, n) for g, prefix in enumerate(prefixes)]
    groups: dict[int, Group] = {}
    waiting: list[tuple[Trajectory, Awaitable[Reply]]] = []
    limits = _Limits(sampling.max_tokens, context, embeddings)

    def close(g: int) -> None:
        if g not in groups and all(t.ended for t in started[g]):
            groups[g] = Group(prompts[g], prefixes[g], [t.rollout() for t in started[g]])
            if on_group is not None:
                on_group(groups[g])

    def took_turn(trajectory: Trajectory, completion: Completion, last: bool) -> None:
        trajectory.add_completion(completion, renderer)
        if (late := _advance(trajectory, renderer, limits, last)) is not None:
            waiting.append((trajectory, late))
        close(trajectory.group)

    pending = [t for group in started for t in group]
    with _awaiting() as wait:
        for turn in range(max_turns):
            last = turn + 1 == max_turns
            _sample(engine, pending, n, sampling, turn, partial(took_turn, last=last))
            replies = wait([t.waited(reply) for t, reply in waiting])
            for (trajectory, _), reply in zip(waiting, replies, strict=True):
                _read(trajectory, reply, renderer, limits, last)
                close(trajectory.group)
            waiting.clear()
            pending = [t for t in pending if not t.ended]
            if not pending:
                break
    return [groups[g] for g in range(len(prompts))]


def _start(
    env: Environment, group: int, prompt: Prompt, prompt_ids: list[int], n: int
) -> list[Trajectory]:
    where = f"environment {env.name}"
    return [Trajectory(group, prompt_ids, env.start(prompt), where, prompt.tools) for _ in range(n)]


@dataclass(frozen=True, slots=True)
class _Limits:
    """Limits of a rollout."""

    sampled: int
    """Largest number of sampled tokens."""
    context: int
    """Largest number of tokens of the prompt with the rollout."""
    embeddings: int | None
    """Number of the model's embeddings, above which no token may be."""


Replies = Sequence[Awaitable[Reply]]


@contextmanager
def _awaiting() -> Iterator[Callable[[Replies], list[Reply]]]:
    """Give a function that awaits replies together, all in one event loop."""

    async def together(replies: Replies) -> list[Reply]:
        return await asyncio.gather(*replies)

    def wait(replies: Replies) -> list[Reply]:
        return thread.submit(runner.run, together(replies)).result() if replies else []

    # In another thread, since a notebook's main thread already runs an event loop.
    with ThreadPoolExecutor(1, "environment") as thread:
        runner = asyncio.Runner()
        try:
            yield wait
        finally:
            thread.submit(runner.close).result()


def _advance(
    trajectory: Trajectory, renderer: Renderer, limits: _Limits, last: bool
) -> Awaitable[Reply] | None:
    """Pass a sampled turn to the environment, and return its reply if that must be awaited."""
    if trajectory.finish == "length":
        trajectory.end("length")
    elif trajectory.calls and (last or trajectory.sampled >= limits.sampled):
        trajectory.end("length")  # no turn is left to read the tools' results
    else:
        reply = trajectory.step()
        if inspect.isawaitable(reply):
            return reply
        _read(trajectory, reply, renderer, limits, last)
    return None


def _read(
    trajectory: Trajectory, reply: Reply, renderer: Renderer, limits: _Limits, last: bool
) -> None:
    """Append the environment's messages, or end the rollout if it is done or at a limit."""
    trajectory.earn(reply.reward)
    if reply.done:
        trajectory.end("stop")
        return
    if last or trajectory.sampled >= limits.sampled:
        trajectory.end("length")
        return
    messages = [_encodable(message) for message in reply.messages]
    if not messages:
        raise UserError(
            f"{trajectory.where}: step returned no messages and done=False; return done=True to "
            "end the rollout"
        )
    trajectory.tool_calls += sum(message["role"] == "tool" for message in messages)
    trajectory.tool_failures += reply.tool_failures
    trajectory.messages += messages
    glue = renderer.reply_ids(trajectory.turn_ids, messages)
    if limits.embeddings is not None:
        where = f"{trajectory.where}: its reply"
        refuse_beyond(glue, renderer.tokenizer, limits.embeddings, where)
    if len(trajectory.prompt_ids) + len(trajectory.token_ids) + len(glue) >= limits.context:
        trajectory.end("length")
    else:
        trajectory.add_context(glue)


def _encodable(message: Message) -> Message:
    """A message whose text can be tokenised: lone surrogates, which no encoding has, are written as
    escapes."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": content.encode("utf-8", "backslashreplace").decode()}


def _sample(
    engine: Engine,
    pending: Sequence[Trajectory],
    n: int,
    sampling: SamplingParams,
    turn: int,
    took_turn: Callable[[Trajectory, Completion], None],
) -> None:
    """Sample one turn of each pending rollout; in the first turn ``n`` share a prefix."""
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
