"""Tool environments: the adapter that turns a user's class of tools into episodes."""

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
from rlsloth.data.rows import Row
from rlsloth.environments.protocol import GENERATED, Episode, Reply
from rlsloth.errors import UserError, describe_exception
from rlsloth.records import Message, Prompt

NO_TOOLS = ("reset", "get_reward")
"""Public methods of a class of tools that the model cannot call."""


class Tools(Protocol):
    """Tools of one rollout."""

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Return a tool's result, or an awaitable of it. An exception's text goes to the model."""
        ...


@dataclass(frozen=True, slots=True)
class MethodTools:
    """Methods of a user's instance as tools."""

    instance: Any
    names: tuple[str, ...]

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Call the method ``name``."""
        if name not in self.names:
            raise ValueError(f"no tool {name!r}; there is: {', '.join(self.names)}")
        return getattr(self.instance, name)(**arguments)


@dataclass(frozen=True, slots=True)
class ToolEpisode(Episode):
    """A rollout that goes on as long as the model calls tools."""

    tools: Tools
    get_reward: Callable[[], float | None] | None = None

    def step(self, message: Message) -> Reply | Awaitable[Reply]:
        """Run the calls of a turn, plain ones first, then async ones in order; done without any."""
        calls = message.get("tool_calls")
        if not calls:
            return Reply(done=True)
        answers = [self._answer(call) for call in calls]
        if any(inspect.isawaitable(answer) for answer in answers):
            return _awaited(answers)
        return _reply(answers)

    def end(self) -> float | None:
        """Return the class's own reward."""
        return None if self.get_reward is None else self.get_reward()

    def _answer(self, call: Message) -> Any:
        """A tool message and whether it failed, or an awaitable of them."""
        name = call["function"]["name"]
        try:
            if error := call.get("error"):
                raise ValueError(error)
            output = self.tools.call(name, call["function"]["arguments"])
            return _later(name, output) if inspect.isawaitable(output) else _message(name, output)
        # A tool is foreign code: its failure, even an exit, is the model's to read.
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
    """Prompts with tools: the public methods of a class in TRL's environment convention."""

    name: str
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    default_rewards: tuple[str, ...]
    factory: Callable[[], Any]
    tools: tuple[str, ...]
    source: str
    single_turn: bool = False

    def start(self, prompt: Prompt) -> ToolEpisode:
        """A fresh instance, reset with the prompt's columns.

        Raises:
            UserError: the class or its reset raised, or reset returned another text than before.
        """
        instance = _instance(self.factory, self.name)
        text = _reset(instance, prompt, self.name)
        if not _last(prompt)["content"].endswith(text):
            raise UserError(f"environment {self.name}: reset must return the same text for a row")
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

    ``factory()`` makes an instance for each rollout; ``reset(**columns)`` returns None or text that
    is appended to the prompt; ``get_reward()``, if there is one, is called when the rollout has
    ended, and its number is the reward ``environment``; every other public method is a
    tool, with a schema from its signature and docstring. A group's rollouts share one prompt,
    so ``reset`` is called for each row when the environment is made and again when a rollout
    starts, and must return the same text.

    Args:
        rows: the problems; when None those of ``cfg.train``, and ``cfg.params`` go to the factory.
    """
    if rows is None:
        _check_params(name, factory, cfg)
        factory = partial(factory, **cfg.params)
    probe = _instance(factory, name)
    names = _tool_names(probe, name)
    schemas = [_schema(getattr(probe, tool), name) for tool in names]

    def make(rows: list[Row], where: str) -> list[Prompt]:
        prompts = make_prompts(rows, cfg, where, schemas, conversational=True)
        return [_observed(_instance(factory, name), prompt, name) for prompt in prompts]

    source = cfg.train if rows is None else GENERATED
    if rows is None:
        train, heldout = load_prompts(cfg, seed, make)
    else:
        train, heldout = split_heldout(make(rows, name), cfg.heldout, seed)
    if not default_rewards and hasattr(probe, "get_reward"):
        default_rewards = ("environment",)
    return ToolEnvironment(name, train, heldout, default_rewards, factory, names, source)


def _check_params(name: str, factory: Callable[..., Any], cfg: EnvConfig) -> None:
    signature = inspect.signature(factory)
    try:
        signature.bind(**cfg.params)
    except TypeError as error:
        raise UserError(
            f"environment {name} with --env.params {dict(cfg.params)}: {error}; "
            f"it takes {signature}"
        ) from None


def _instance(factory: Callable[[], Any], name: str) -> Any:
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"environment {name}: its class raised {describe_exception(error)}"
        ) from error


def _tool_names(instance: Any, name: str) -> tuple[str, ...]:
    # Looked up on the class: on the instance it would run properties.
    methods = inspect.getmembers(type(instance), inspect.isfunction)
    for method, function in methods:
        if method in NO_TOOLS and inspect.iscoroutinefunction(function):
            raise UserError(f"environment {name}: {method} is async; make it a plain method")
    tools = [m for m in methods if not m[0].startswith("_") and m[0] not in NO_TOOLS]
    if not tools:
        raise UserError(f"environment {name} has no public method besides reset, so no tool")
    return tuple(tool for tool, _ in tools)


def _schema(tool: Callable[..., Any], name: str) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    try:
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:  # its own exception types for docstrings and for hints
        reason = " ".join(str(error).split())
        raise UserError(
            f"environment {name}: no schema for tool {tool.__name__}: {reason}"
        ) from error
    return schema


def _reset(instance: Any, prompt: Prompt, name: str) -> str:
    """The text that reset returns for the prompt's row; empty for None."""
    try:
        text = instance.reset(**prompt.columns)
    except (Exception, SystemExit) as error:
        problem = f"on row {prompt.index + 1} raised {describe_exception(error)}"
        raise UserError(f"environment {name}: reset {problem}") from error
    if isinstance(text, list) and all(isinstance(part, dict) and "text" in part for part in text):
        text = "".join(part["text"] for part in text)
    if not isinstance(text, str | None):
        raise UserError(
            f"environment {name}: reset returns text or None, not {type(text).__name__}"
        )
    return text or ""


def _observed(instance: Any, prompt: Prompt, name: str) -> Prompt:
    """The prompt with the text of reset appended to its last message."""
    text = _reset(instance, prompt, name)
    last = _last(prompt)
    observed = {**last, "content": last["content"] + text}
    return replace(prompt, messages=(*prompt.messages[:-1], observed))


def _last(prompt: Prompt) -> Message:
    assert isinstance(prompt.messages, tuple)  # make_prompts was asked for conversations
    return prompt.messages[-1]
