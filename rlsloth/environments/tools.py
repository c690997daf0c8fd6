"""Adapter that makes an environment of a class whose methods are tools."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from rlsloth.config import EnvConfig
from rlsloth.data.heldout import split_heldout
from rlsloth.data.prompts import load_prompts, make_prompts
from rlsloth.data.reading import Reading
from rlsloth.data.rows import Row
from rlsloth.environments.protocol import GENERATED, Episode, Reply
from rlsloth.errors import UserError, describe_exception
from rlsloth.records import Message, Prompt

NO_TOOLS = ("reset", "get_reward")
"""Public methods that are not offered to the model as tools."""


class Tools(Protocol):
    """Tools of one rollout."""

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Return a tool's result, or an awaitable of it; the model reads an exception's text."""
        ...


@dataclass(frozen=True, slots=True)
class MethodTools:
    """Tools that are methods of an instance."""

    instance: Any
    names: tuple[str, ...]

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Call the method ``name``."""
        if name not in self.names:
            raise ValueError(f"no tool {name!r}; available: {', '.join(self.names)}")
        return getattr(self.instance, name)(**arguments)


@dataclass(frozen=True, slots=True)
class ToolEpisode(Episode):
    """Episode that continues as long as the model calls tools."""

    tools: Tools
    get_reward: Callable[[], float | None] | None = None

    def step(self, message: Message) -> Reply | Awaitable[Reply]:
        """Run the tool calls of a turn, or end the rollout if there are none.

        Plain tools run first, then async ones, one after another in the order of the calls.
        """
        calls = message.get("tool_calls")
        if not calls:
            return Reply(done=True)
        answers = [self._answer(call) for call in calls]
        if any(inspect.isawaitable(answer) for answer in answers):
            return _awaited(answers)
        return _reply(answers)

    def end(self) -> float | None:
        """Return the number from ``get_reward``; None if the class has no such method."""
        return None if self.get_reward is None else self.get_reward()

    def _answer(self, call: Message) -> Any:
        """Run one call. Returns its message and whether it failed, or an awaitable of both."""
        name = call["function"]["name"]
        try:
            if error := call.get("error"):
                raise ValueError(error)
            output = self.tools.call(name, call["function"]["arguments"])
            return _later(name, output) if inspect.isawaitable(output) else _message(name, output)
        # Tools are foreign code: any failure, even an exit, becomes a message to the model.
        except (Exception, SystemExit) as error:
            return _failure(name, error)


def _message(name: str, output: Any) -> tuple[Message, bool]:
    content = output if isinstance(output, str) else json.dumps(output)
    return {"role": "tool", "name": name, "content": content}, False


def _failure(name: str, error: BaseException) -> tuple[Message, bool]:
    return {"role": "tool", "name": name, "content": f"error: {error}"}, True


async def _later(name: str, output: Awaitable[Any]) -> tuple[Message, bool]:
    try:
        return _message(name, await output)
    except (Exception, SystemExit) as error:
        return _failure(name, error)


async def _awaited(answers: Sequence[Any]) -> Reply:
    return _reply([await a if inspect.isawaitable(a) else a for a in answers])


def _reply(answers: Sequence[tuple[Message, bool]]) -> Reply:
    return Reply([m for m, _ in answers], tool_failures=sum(failed for _, failed in answers))


@dataclass(frozen=True, slots=True)
class ToolEnvironment:
    """Environment whose tools are the public methods of a class (TRL's convention)."""

    name: str
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    default_rewards: tuple[str, ...]
    factory: Callable[[], Any]
    tools: tuple[str, ...]
    source: str
    single_turn: bool = False
    reading: Reading | None = None
    """Findings about the dataset, which a run prints; None if it reads none."""

    def start(self, prompt: Prompt) -> ToolEpisode:
        """Begin an episode with a new instance, reset with the prompt's columns.

        Raises:
            UserError: the class or its reset raised, or reset returned different text this time.
        """
        instance = _instance(self.factory, self.name)
        text = _reset(instance, prompt, self.name)
        if not _last(prompt)["content"].endswith(text):
            raise UserError(
                f"environment {self.name}: reset returned different text for row "
                f"{prompt.index + 1} than before; make it depend on the row's columns only"
            )
        return ToolEpisode(MethodTools(instance, self.tools), getattr(instance, "get_reward", None))


def tool_environment(
    name: str,
    factory: Callable[..., Any],
    cfg: EnvConfig,
    seed: int,
    rows: list[Row] | None = None,
    default_rewards: tuple[str, ...] = (),
) -> ToolEnvironment:
    """Make an environment from a class in TRL's convention.

    ``factory()`` makes an instance for each rollout. ``reset(**columns)`` returns None or text that
    is appended to the prompt. ``get_reward()``, if the class has it, is called when the rollout
    ends and returns the reward ``environment``. Every other public method is a tool; its schema
    comes from its signature and docstring. A group's rollouts share one prompt, so ``reset`` is
    called for each row when the environment is made and again when a rollout starts, and must
    return the same text for the same row.

    Args:
        rows: the problems. None: those of ``cfg.train``; ``cfg.params`` then go to the factory.
    """
    if rows is None:
        _check_params(name, factory, cfg)
        factory = partial(factory, **cfg.params)
    probe = _instance(factory, name)
    names = _tool_names(probe, name)
    schemas = [_schema(getattr(probe, tool), name) for tool in names]

    reading = Reading.of(cfg)

    def make(rows: list[Row], where: str) -> list[Prompt]:
        prompts = make_prompts(rows, cfg, where, schemas, conversational=True, reading=reading)
        return [_observed(_instance(factory, name), prompt, name) for prompt in prompts]

    source = cfg.train if rows is None else GENERATED
    if rows is None:
        train, heldout = load_prompts(cfg, seed, make, reading)
    else:
        train, heldout = split_heldout(make(rows, name), cfg.heldout, seed)
    if not default_rewards and hasattr(probe, "get_reward"):
        default_rewards = ("environment",)
    found = reading if rows is None else None
    return ToolEnvironment(
        name, train, heldout, default_rewards, factory, names, source, reading=found
    )


def _check_params(name: str, factory: Callable[..., Any], cfg: EnvConfig) -> None:
    signature = inspect.signature(factory)
    try:
        signature.bind(**cfg.params)
    except TypeError as error:
        raise UserError(
            f"environment {name} cannot be made with --env.params {dict(cfg.params)}: {error}; "
            f"its signature is {signature}"
        ) from None


def _instance(factory: Callable[[], Any], name: str) -> Any:
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"environment {name}: making its class raised {describe_exception(error)}"
        ) from error


def _tool_names(instance: Any, name: str) -> tuple[str, ...]:
    # On the class, since looking names up on the instance would run its properties.
    methods = inspect.getmembers(type(instance), inspect.isfunction)
    for method, function in methods:
        if method in NO_TOOLS and inspect.iscoroutinefunction(function):
            raise UserError(f"environment {name}: {method} is async; make it a plain method")
    tools = [m for m in methods if not m[0].startswith("_") and m[0] not in NO_TOOLS]
    if not tools:
        raise UserError(
            f"environment {name} has no tool: write a public method besides reset and get_reward"
        )
    return tuple(tool for tool, _ in tools)


def _schema(tool: Callable[..., Any], name: str) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    try:
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:  # transformers has several types, for docstrings and for hints
        reason = " ".join(str(error).split())
        raise UserError(
            f"environment {name}: cannot make a schema for tool {tool.__name__}: {reason}"
        ) from error
    return schema


def _reset(instance: Any, prompt: Prompt, name: str) -> str:
    """Call reset for the prompt's row. Returns its text, empty for None."""
    try:
        text = instance.reset(**prompt.columns)
    except (Exception, SystemExit) as error:
        reason = describe_exception(error)
        raise UserError(
            f"environment {name}: reset raised {reason} on row {prompt.index + 1}"
        ) from error
    if isinstance(text, list) and all(isinstance(part, dict) and "text" in part for part in text):
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str | None):
        raise UserError(
            f"environment {name}: reset must return text or None, not {type(text).__name__}"
        )
    return text or ""


def _observed(instance: Any, prompt: Prompt, name: str) -> Prompt:
    """Append the text of reset to the prompt's last message."""
    text = _reset(instance, prompt, name)
    last = _last(prompt)
    observed = {**last, "content": last["content"] + text}
    return replace(prompt, messages=(*prompt.messages[:-1], observed))


def _last(prompt: Prompt) -> Message:
    assert isinstance(prompt.messages, tuple)  # make_prompts was called with conversational=True
    return prompt.messages[-1]
