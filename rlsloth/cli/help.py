"""Help of a command, made from its configuration: each option with its type and default."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlsloth.cli.keys import fields, is_section, kind_of, spelt
from rlsloth.config import LossConfig, Section
from rlsloth.losses.variants import VARIANTS

INDENT = " " * 8
NAMES: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


def print_help(models: Sequence[type[Section]], prog: str, about: str) -> None:
    """Print a command's usage, its description and all its options.

    Args:
        models: configurations whose options the command takes.
    """
    sections = any(is_section(f.annotation) for model in models for f in fields(model).values())
    files = " [FILE.yaml ...]" if sections else ""
    width = min(shutil.get_terminal_size().columns, 100)
    print(f"usage: {prog}{files} [OPTIONS]\n")
    for paragraph in about.split("\n\n"):
        print(textwrap.fill(" ".join(paragraph.split()), width), end="\n\n")
    if sections:
        note = "Files merge from left to right; options win over files. A list takes several values"
        print(textwrap.fill(f"{note} (--rewards A B), a mapping pairs (--env.params KEY VALUE).",
                            width), end="\n\n")  # fmt: skip
    print("options:\n  -h, --help\n" + INDENT + "Print this text.")
    for model in models:
        for line in _options(model, "", width):
            print(line)


def _options(model: type[BaseModel], prefix: str, width: int) -> Iterator[str]:
    """Lines of a section: its own options, then its sections."""
    inner: dict[str, type[BaseModel]] = {}
    for name, field in fields(model).items():
        if is_section(field.annotation):
            inner[prefix + name] = field.annotation
            continue
        built_in = _built_in(model, name)
        kind = "{" + ",".join(built_in) + "}|MODULE:NAME|FILE.py:NAME"
        yield f"  {spelt(prefix + name)} {kind if built_in else type_name(field.annotation)}"
        about = " ".join([_description(field), *(f"{n}: {text}." for n, text in built_in.items())])
        yield textwrap.fill(about, width, initial_indent=INDENT,
                            subsequent_indent=INDENT)  # fmt: skip
    for name, section in inner.items():
        about = " ".join((section.__doc__ or "").split())
        yield f"\n{name} options:"
        yield textwrap.fill(about, width, initial_indent="  ", subsequent_indent="  ")
        yield from _options(section, f"{name}.", width)


def _built_in(model: type[BaseModel], name: str) -> dict[str, str]:
    """Name -> description of the built-in plugins that an option can name."""
    if (model, name) != (LossConfig, "name"):
        return {}
    return {name: loss.about for name, loss in VARIANTS.items()}


def _description(field: FieldInfo) -> str:
    """The field's docstring and default; a default of none is left out if the docstring has it."""
    words = " ".join((field.description or "").split())
    if field.default is None and "default" in words.lower():
        return words
    default = "none" if field.default is None else _shown(field.default)
    return f"{words} (default: {default})".strip()


def _shown(value: Any) -> str:
    """A default value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value)) or "empty"
    if isinstance(value, dict):
        return " ".join(f"{key} {_shown(item)}" for key, item in value.items()) or "empty"
    return str(value)


def type_name(annotation: Any) -> str:
    """Placeholder of an option's value: ``INT``, ``{nf4,bf16}``, ``TEXT ...``, ``[true|false]``."""
    kind = kind_of(annotation)
    inner = get_args(kind.type)
    if kind.union:
        members = [member for member in get_args(annotation) if member is not NoneType]
        return "|".join(map(type_name, members))
    if kind.container is dict:
        return "KEY VALUE ..."
    if kind.container is list:
        return f"{type_name(inner[0])} ..."
    if kind.container is tuple:
        return " ".join(map(type_name, inner))
    if get_origin(kind.type) is Literal:
        return "{" + ",".join(map(_shown, inner)) + "}"
    if kind.type is bool:
        return "[true|false]"
    return NAMES.get(inner[0] if inner else kind.type, "VALUE")
