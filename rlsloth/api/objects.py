"""Python objects in a configuration: rewards, rows and environments that a caller passes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from typing import Any, TypeVar

from pydantic import ValidationError

from rlsloth import plugins
from rlsloth.api.fingerprint import hash_code, hash_rows
from rlsloth.config import ProblemsConfig, Section
from rlsloth.config.sft import SupervisedConfig
from rlsloth.errors import UserError

Reward = str | Callable[..., Any]
"""A reward's name, dotted path or file, or the function itself."""
Rows = Iterable[Mapping[str, Any]]
"""Rows of a dataset: a list of dicts, a ``datasets.Dataset``, or any other iterable of mappings."""
Config = TypeVar("Config", bound=ProblemsConfig)
Kind = TypeVar("Kind", bound=Section)
Part = TypeVar("Part", bound=Section)


def checked(config: Config | None, kind: type[Config]) -> Config:
    """Return a configuration, by default that of ``kind`` without settings.

    Raises:
        UserError: it is of another kind, such as a dict or a path.
    """
    return kind() if config is None else of_kind(config, kind)


def of_kind(config: Any, kind: type[Kind]) -> Kind:
    """Return a configuration that must be given.

    Raises:
        UserError: it is of another kind, such as a dict or a path.
    """
    if not isinstance(config, kind):
        arguments = "**config" if isinstance(config, Mapping) else "..."
        raise UserError(
            f"the configuration is of type {type(config).__name__}: pass "
            f"{kind.__name__}({arguments})"
        )
    return config


@contextmanager
def passing_objects(
    config: Config,
    *,
    rewards: Sequence[Reward] | None = None,
    environment: Callable[..., Any] | None = None,
    data: Rows | None = None,
    validation: Rows | None = None,
) -> Iterator[Config]:
    """Yield a configuration that names the objects; the names are valid while the context is open.

    Each argument takes the place of a setting: ``rewards``, ``env.name``, and ``train`` and
    ``validation`` of the section ``data``, or of ``env`` where there is no such section.

    Raises:
        UserError: an object of the wrong kind, or one that the configuration does not allow.
    """
    objects: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    if rewards is not None:
        changes["rewards"] = _reward_names(rewards, objects)
    rows = {
        key: _rows_name(value, key if key == "validation" else "data", objects)
        for key, value in (("train", data), ("validation", validation))
        if value is not None
    }
    env: dict[str, Any] = {}
    if environment is not None:
        env["name"] = _code_name(environment, "environment", objects)
    if isinstance(config, SupervisedConfig):
        if rows:
            changes["data"] = _changed(config.data, rows)
    else:
        env |= rows
    if env:
        changes["env"] = _changed(config.env, env)
    with plugins.passing(objects):
        yield _changed(config, changes) if changes else config


def _reward_names(rewards: Sequence[Reward], objects: dict[str, Any]) -> list[str]:
    if isinstance(rewards, str) or callable(rewards):
        raise UserError("rewards is a list: pass rewards=[...], also for a single one")
    names: list[str] = []
    for reward in rewards:
        name = reward if isinstance(reward, str) else _code_name(reward, "reward", objects)
        names.append(name)
    return names


def _code_name(item: Any, kind: str, objects: dict[str, Any]) -> str:
    """Name a function or class: by its dotted path if that finds it, else as a passed object."""
    if not callable(item):
        raise UserError(
            f"{kind} {item!r} is of type {type(item).__name__}: pass a function or a class"
        )
    module, name = getattr(item, "__module__", None), getattr(item, "__qualname__", "")
    if module and "." in module and getattr(sys.modules.get(module), name, None) is item:
        package = module.partition(".")[0]
        if PathFinder.find_spec(package) is not None:
            return f"{module}:{name}"
    short = _short_name(item)
    taken = {plugins.passed_name(other) for other in objects}
    if short in taken and short == "lambda":
        short = next(n for i in range(2, 999) if (n := f"lambda_{i}") not in taken)
    return _passed(short, hash_code(item), item, objects)


def _short_name(item: Any) -> str:
    """Name that a person gave to a function, a class or the class of a callable object."""
    while hasattr(item, "func"):  # functools.partial
        item = item.func
    name = getattr(item, "__name__", None) or type(item).__name__
    return "lambda" if name == "<lambda>" else name


def _rows_name(data: Rows, argument: str, objects: dict[str, Any]) -> str:
    """Read rows, and name them by their kind, number and hash."""
    kind = type(data).__name__
    if isinstance(data, str | bytes):
        raise UserError(
            f"{argument} takes rows, this is the text {data!r}: files and hub ids are settings, "
            "such as env=EnvConfig(train=...) or data=SftDataConfig(train=...)"
        )
    if isinstance(data, Mapping) or hasattr(data, "to_records"):
        remedy = (
            "pass data.to_dict('records')"
            if hasattr(data, "to_records")
            else f"pass one of its parts, e.g. {argument}=data[{next(iter(data), 'train')!r}]"
        )
        raise UserError(f"{argument} is a {kind}, not rows: {remedy}")
    if not isinstance(data, Iterable):
        raise UserError(
            f"{argument} is of type {kind}: pass a list of dicts, or a datasets.Dataset"
        )
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(data, 1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{argument} row {index} is of type {type(row).__name__}: pass a list of dicts, or "
                "a datasets.Dataset"
            )
        rows.append(dict(row))
    return _passed(f"{kind}({len(rows)} rows)", hash_rows(rows), rows, objects)


def _passed(name: str, digest: str, item: Any, objects: dict[str, Any]) -> str:
    spec = f"{plugins.PASSED}{name}#{digest}"
    objects[spec] = item
    return spec


def _changed(section: Part, changes: Mapping[str, Any]) -> Part:
    """Return a section with some values replaced, and checked again."""
    try:
        return type(section).model_validate({**dict(section), **changes})
    except ValidationError as error:
        texts = [problem["msg"].removeprefix("Value error, ") for problem in error.errors()]
        raise UserError("\n".join(texts)) from None
