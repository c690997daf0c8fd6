"""Keys of a configuration: names of sections and options, and their types."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlsloth.config import Section

KeyPath = tuple[str, ...]
"""``("optim", "lr")`` for optim.lr."""


class Kind(NamedTuple):
    """An annotation without its ``| None``."""

    type: Any
    optional: bool
    union: bool
    """Whether more than one type is left."""

    @property
    def container(self) -> Any:
        """dict, list or tuple, or None for a single value."""
        origin = get_origin(self.type)
        return origin if origin in (dict, list, tuple) else None


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether an annotation is a section, which holds keys of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by key: an alias replaces a field's own name."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def annotation_at(model: type[Section], path: Sequence[str]) -> Any:
    """The annotation at a key path; None if there is no such key."""
    found: Any = model
    for key in path:
        if is_section(found):
            field = fields(found).get(key)
            found = field.annotation if field else None
        else:
            found = get_args(found)[1] if get_origin(found) is dict else None
    return found


def kind_of(annotation: Any) -> Kind:
    """The type as which values of an annotation are read."""
    union = get_origin(annotation) in (Union, types.UnionType)
    members = get_args(annotation) if union else (annotation,)
    some = [member for member in members if member is not types.NoneType]
    return Kind(some[0], optional=len(some) < len(members), union=len(some) > 1)


def key_path(model: type[Section], name: str) -> KeyPath:
    """Keys of a dotted option name. ``-`` means ``_`` in names of fields; keys of mappings stay as
    typed."""
    path: KeyPath = ()
    for part in name.split("."):
        in_mapping = bool(path) and get_origin(annotation_at(model, path)) is dict
        path += (part if in_mapping else part.replace("-", "_"),)
    return path


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all sections and options."""
    for name, field in fields(model).items():
        yield prefix + name
        if is_section(field.annotation):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def options(model: type[Section]) -> list[str]:
    """Dotted names of all options, without the sections."""
    return [n for n in known_keys(model) if not is_section(annotation_at(model, n.split(".")))]


def spelt(name: str) -> str:
    """An option as it is typed: ``--optim.warmup-steps``."""
    return "--" + name.replace("_", "-")
