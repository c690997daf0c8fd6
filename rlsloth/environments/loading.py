"""Finding an environment by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from rlsloth import plugins
from rlsloth.config import EnvConfig
from rlsloth.environments.protocol import Environment
from rlsloth.environments.tools import tool_environment
from rlsloth.errors import UserError, describe_exception
from rlsloth.records import Prompt

PACKAGE = "rlsloth.envs"


def load_environment(cfg: EnvConfig, seed: int) -> Environment:
    """Find and make the environment that ``cfg.name`` names.

    A built-in one (``dataset``, ``reasoning_gym:chain_sum``), or ``pkg.module:name`` or
    ``./file.py:name``: either a class with a method ``reset``, whose other public methods are tools
    over the rows of ``cfg.train`` (see tool_environment), or a function or
    class that is called with ``cfg`` and ``seed`` and returns an Environment.

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
    if inspect.isclass(found) and hasattr(found, "reset"):
        return tool_environment(cfg.name, found, cfg, seed)
    if inspect.isclass(found) and not hasattr(found, "start"):
        raise UserError(
            f"environment {cfg.name}: a class of tools has a method reset, an Environment a method "
            "start; this one has neither (see envs/README.md)"
        )
    return _own_environment(cfg.name, found, cfg, seed)


def _own_environment(name: str, make: Any, cfg: EnvConfig, seed: int) -> Environment:
    """Call a user's function, and check its result for mistakes that would stop a run midway."""
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
    for member in ("name", "train", "heldout", "default_rewards", "single_turn", "source", "start"):
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
