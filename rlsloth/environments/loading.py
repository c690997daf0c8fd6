"""Load an environment by name, dotted path or file."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from rlsloth import plugins
from rlsloth.config import EnvConfig
from rlsloth.environments.protocol import Declaration, Environment
from rlsloth.environments.tools import tool_environment
from rlsloth.errors import UserError, describe_exception
from rlsloth.records import Prompt

PACKAGE = "rlsloth.envs"


def load_environment(cfg: EnvConfig, seed: int) -> Environment:
    """Load the environment ``cfg.name`` and make it from the configuration.

    The name is a built-in one (``dataset``, ``reasoning_gym:chain_sum``), ``pkg.module:name`` or
    ``./file.py:name``. The last two name either a class with a method ``reset``, whose other public
    methods are tools for the rows of ``cfg.train`` (see tool_environment), or a function or class
    that is called with ``cfg`` and ``seed`` and returns an Environment.

    Args:
        seed: determines generated problems and the choice of held-out questions.

    Raises:
        UserError: there is no such environment, or it cannot be made from the configuration.
    """
    builtin = cfg.name.partition(":")[0]
    # A built-in environment reads the rest of its name itself: reasoning_gym:chain_sum.
    if builtin in plugins.builtin_names(PACKAGE):
        environment: Environment = plugins.load(builtin, PACKAGE)(cfg, seed)
        return environment
    found = plugins.load(cfg.name, PACKAGE)
    if inspect.isclass(found) and hasattr(found, "reset"):
        return tool_environment(cfg.name, found, cfg, seed)
    if inspect.isclass(found) and not hasattr(found, "start"):
        raise UserError(
            f"environment {cfg.name} has neither a method reset, as a class of tools has, nor a "
            "method start, as an Environment has; write one of them (see envs/README.md)"
        )
    return _own_environment(cfg.name, found, cfg, seed)


def declaration(cfg: EnvConfig) -> Declaration:
    """Return the facts that the environment ``cfg.name`` declares. Raises UserError where there is
    no such environment."""
    found, _ = _find(cfg.name)
    declared = getattr(found, "declaration", None)
    return declared if isinstance(declared, Declaration) else Declaration()


def _find(name: str) -> tuple[Any, bool]:
    """Find the function or class that makes an environment, and whether it is built in."""
    place = name.partition(":")[0]
    # What follows the colon of a built-in name is the environment's own to read.
    if place in plugins.builtin_names(PACKAGE):
        return plugins.load(place, PACKAGE), True
    return plugins.load(name, PACKAGE), False


def _own_environment(name: str, make: Any, cfg: EnvConfig, seed: int) -> Environment:
    """Call a user's function and check its result, so that mistakes show before the first step."""
    if not callable(make):
        raise UserError(
            f"environment {name} is of type {type(make).__name__}; name a class or function"
        )
    signature = inspect.signature(make)
    try:
        signature.bind(cfg, seed)
    except TypeError as error:
        raise UserError(
            f"environment {name} is called with (cfg, seed), but its signature is {signature}: "
            f"{error}"
        ) from None
    try:
        environment: Environment = make(cfg, seed)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"environment {name} raised {describe_exception(error)}") from error
    for member in ("name", "train", "heldout", "default_rewards", "single_turn", "source", "start"):
        if not hasattr(environment, member):
            raise UserError(
                f"environment {name} returned a {type(environment).__name__} without {member!r}: "
                "return an object with every member of rlsloth.environments.protocol.Environment, "
                "for example a SingleTurn"
            )
    for member in ("train", "heldout"):
        _check_prompts(getattr(environment, member), f"environment {name}: {member}")
    return environment


def _check_prompts(prompts: Any, where: str) -> None:
    if not isinstance(prompts, Sequence):
        raise UserError(
            f"{where} must be a list of rlsloth.records.Prompt, not a {type(prompts).__name__}"
        )
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise UserError(
                f"{where}[{index}] must be a rlsloth.records.Prompt, not a {type(prompt).__name__}"
            )
