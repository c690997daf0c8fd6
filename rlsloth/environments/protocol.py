"""What answers the policy: the protocol of environments, and finding one by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from rlsloth import plugins
from rlsloth.config import EnvConfig
from rlsloth.data.heldout import split_heldout
from rlsloth.data.prompts import load_prompts, make_prompts
from rlsloth.data.rows import Row
from rlsloth.errors import UserError, describe_exception
from rlsloth.records import Message, Prompt

PACKAGE = "rlsloth.envs"


class Session(Protocol):
    """One rollout's private state in a tool environment."""

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The result of a tool. If it raises, the model reads the error: a tool failure."""
        ...


class Environment(Protocol):
    """Prompts, and what a rollout can do besides answering."""

    @property
    def name(self) -> str:
        """As configured."""
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
        """Used when the configuration names none."""
        ...

    def start(self, prompt: Prompt) -> Session | None:
        """A session for one rollout of a prompt; None where a rollout is a single turn."""
        ...


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """An environment that is its prompts: the first answer ends the rollout."""

    name: str
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    default_rewards: tuple[str, ...] = ()

    def start(self, prompt: Prompt) -> None:
        """No session."""


@dataclass(frozen=True, slots=True)
class ToolEnvironment:
    """Prompts with tools: the public methods of a class in TRL's environment convention."""

    name: str
    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    default_rewards: tuple[str, ...]
    factory: Callable[[], Any]
    tools: tuple[str, ...]

    def start(self, prompt: Prompt) -> ToolSession:
        """A fresh instance, reset with the prompt's columns.

        Raises:
            UserError: the class or its reset raised, or reset returned another text than before.
        """
        instance = _instance(self.factory, self.name)
        text = _reset(instance, prompt, self.name)
        if not _last(prompt)["content"].endswith(text):
            raise UserError(f"environment {self.name}: reset must return the same text for a row")
        return ToolSession(instance, self.tools)


@dataclass(frozen=True, slots=True)
class ToolSession:
    """An instance of the user's class after its reset."""

    instance: Any
    tools: tuple[str, ...]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Calls the method ``name``; a result that is not text becomes JSON."""
        if name not in self.tools:
            raise ValueError(f"no tool {name!r}; there is: {', '.join(self.tools)}")
        result = getattr(self.instance, name)(**arguments)
        return result if isinstance(result, str) else json.dumps(result)


def load_environment(cfg: EnvConfig, seed: int) -> Environment:
    """The environment that ``cfg.name`` names.

    A built-in one (``dataset``, ``reasoning_gym:chain_sum``), or ``pkg.module:name`` or
    ``./file.py:name``: either a class with a method ``reset``, whose other public methods are tools
    over the rows of ``cfg.train`` (see tool_environment), or a function of ``cfg`` and ``seed``
    that returns an Environment.

    Args:
        seed: fixes generated problems and the choice of held-out questions.

    Raises:
        UserError: no such environment, or it cannot be made from the configuration.
    """
    place = cfg.name.partition(":")[0]
    # What follows the colon of a built-in name is the environment's own to read.
    if place in plugins.builtin_names(PACKAGE):
        environment: Environment = plugins.load(place, PACKAGE)(cfg, seed)
        return environment
    found = plugins.load(cfg.name, PACKAGE)
    if not inspect.isclass(found):
        return _own_environment(cfg.name, found, cfg, seed)
    if not hasattr(found, "reset"):
        raise UserError(
            f"environment {cfg.name}: a class of tools has a method reset (see envs/README.md)"
        )
    return tool_environment(cfg.name, found, cfg, seed)


def _own_environment(name: str, make: Any, cfg: EnvConfig, seed: int) -> Environment:
    """What a user's function returns, checked for what would fail in the middle of a run."""
    if not callable(make):
        raise UserError(f"environment {name} is a {type(make).__name__}, not a class or function")
    signature = inspect.signature(make)
    try:
        signature.bind(cfg, seed)
    except TypeError as error:
        raise UserError(
            f"environment {name} is called with (cfg, seed): {error}; it takes {signature}"
        ) from None
    try:
        environment: Environment = make(cfg, seed)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"environment {name} raised {describe_exception(error)}") from error
    for member in ("name", "train", "heldout", "default_rewards", "start"):
        if not hasattr(environment, member):
            raise UserError(
                f"environment {name} returned a {type(environment).__name__} without {member!r}: "
                "return a rlsloth.environments.protocol.Environment, for example a SingleTurn"
            )
    for member in ("train", "heldout"):
        _check_prompts(getattr(environment, member), f"environment {name}: {member}")
    return environment


def _check_prompts(prompts: Any, what: str) -> None:
    if not isinstance(prompts, Sequence):
        raise UserError(f"{what} is a list of prompts, not a {type(prompts).__name__}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise UserError(
                f"{what}[{index}] is a {type(prompt).__name__}, not a rlsloth.records.Prompt"
            )


def tool_environment(
    name: str,
    factory: Callable[..., Any],
    cfg: EnvConfig,
    seed: int,
    rows: list[Row] | None = None,
    default_rewards: tuple[str, ...] = (),
) -> ToolEnvironment:
    """An environment from a class in TRL's convention.

    ``factory()`` makes an instance for each rollout; ``reset(**columns)`` returns None or text that
    is appended to the prompt; every other public method is a tool, with a schema from its signature
    and docstring. A group's rollouts share one prompt, so ``reset`` is called for each row when the
    environment is made and again when a rollout starts, and must return the same text.

    Args:
        rows: the problems; when None those of ``cfg.train``, and ``cfg.params`` go to the factory.
    """
    if rows is None:
        _check_params(name, factory, cfg)
        factory = partial(factory, **cfg.params)
    probe = _instance(factory, name)
    names = _tool_names(probe, name)
    schemas = [_schema(getattr(probe, tool), name) for tool in names]

    def make(rows: list[Row], source: str) -> list[Prompt]:
        prompts = make_prompts(rows, cfg, source, schemas, conversational=True)
        return [_observed(_instance(factory, name), prompt, name) for prompt in prompts]

    if rows is None:
        train, heldout = load_prompts(cfg, seed, make)
    else:
        train, heldout = split_heldout(make(rows, name), cfg.heldout, seed)
    return ToolEnvironment(name, train, heldout, default_rewards, factory, names)


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
    if any(method == "get_reward" for method, _ in methods):
        raise UserError(
            f"environment {name}: get_reward is not called here; make it a reward (--rewards)"
        )
    tools = [m for m in methods if not m[0].startswith("_") and m[0] != "reset"]
    for tool, function in tools:
        if inspect.iscoroutinefunction(function):
            raise UserError(
                f"environment {name}: tool {tool} is async; only plain methods are called"
            )
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
    """What reset says of the prompt's row; empty for None."""
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
    """The prompt with what reset says appended to its last message."""
    text = _reset(instance, prompt, name)
    last = _last(prompt)
    observed = {**last, "content": last["content"] + text}
    return replace(prompt, messages=(*prompt.messages[:-1], observed))


def _last(prompt: Prompt) -> Message:
    assert isinstance(prompt.messages, tuple)  # make_prompts was asked for conversations
    return prompt.messages[-1]
