"""config.yaml of a run or a distillation: save it, and compare a later command with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlsloth.config.section import Section
from rlsloth.errors import UserError, first_line
from rlsloth.files import flatten, write_atomically

Changes = dict[str, tuple[object, object]]
"""Dotted key -> (old, new), in YAML's types; None where a mapping lacks the key."""


def save_config(path: Path, values: Mapping[str, Any]) -> None:
    """Write a configuration as a YAML file that the same command reads."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)
    write_atomically(path, text)


def changed_settings(path: Path, cfg: Section, remedy: str) -> Changes:
    """Settings in which ``cfg`` differs from the configuration saved at ``path``.

    Args:
        remedy: what the user can do about a damaged file.

    Raises:
        UserError: the saved configuration is damaged.
    """
    try:
        saved = type(cfg).model_validate(yaml.safe_load(path.read_bytes()))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read as the configuration of this command ({_reason(error)}): "
            f"{remedy}"
        ) from None
    before, after = (flatten(each.model_dump(mode="json")) for each in (saved, cfg))
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key)
    }


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return first_line(error)
    first = error.errors(include_url=False)[0]
    return " ".join([".".join(map(str, first["loc"])), *first["msg"].split()]).strip()


def refuse_changed(folder: Path, changes: Changes, fixed: Iterable[str], remedy: str) -> None:
    """Refuse a resume that changes a fixed setting.

    Args:
        fixed: dotted keys of settings, or names of whole sections, that cannot change.
        remedy: what the user can do instead.

    Raises:
        UserError: names the first such setting with its old and new value.
    """
    names = tuple(fixed)
    for key, (old, new) in changes.items():
        if any(key == name or key.startswith(f"{name}.") for name in names):
            raise UserError(
                f"{folder} was made with {key} {old}, which cannot become {new} on resume: {remedy}"
            )
