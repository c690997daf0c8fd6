"""YAML files of a configuration: strict reading, and merging by key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlsloth.cli.keys import KeyPath, annotation_at, is_section
from rlsloth.config import Section
from rlsloth.distillation.raw import FILE as TRACES
from rlsloth.errors import UserError, first_line
from rlsloth.run.folder import CONFIG, METRICS

SUFFIXES = (".yaml", ".yml")
Origins = dict[KeyPath, str]
"""Key path -> source of its value: a file's name, or the flag as typed."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, and reads 3e-5 as a number (YAML 1.1: text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                hint = f"key {key!r} is not text; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, hint, key_node.start_mark)
            if key in seen:
                hint = f"duplicate key {key!r}; remove one of the two"
                raise yaml.constructor.ConstructorError(None, None, hint, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(file: str) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file.

    Raises:
        UserError: the file cannot be read or is not a YAML mapping.
    """
    try:
        data = yaml.load(Path(file).read_bytes(), Loader=_Loader)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read: {error.strerror} (current folder: {Path.cwd()})"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not YAML: {first_line(error)}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        kind = {"str": "text", "list": "a list"}.get(type(data).__name__, type(data).__name__)
        raise UserError(f"{file}: contains {kind}, not keys; write lines such as 'steps: 100'")
    return data


def plain_scalar(word: str) -> bool | int | float | str:
    """A word as YAML reads it: ``2`` is a number, ``true`` a bool; all other words stay text."""
    try:
        value = yaml.load(word, Loader=_Loader)
    except yaml.YAMLError:
        return word
    return value if isinstance(value, bool | int | float | str) else word


def merge_file(
    merged: dict[str, Any], file: str, data: Mapping[str, Any], model: type[Section], to: Origins
) -> None:
    """Merge a file's mapping key by key into ``merged``, and record its values' origin in ``to``.

    The config.yaml of a run or a distillation gets the folder where it is now, even if that folder
    was moved since.
    """
    # A section whose keys are all commented out is read as null.
    empty = [k for k, v in data.items() if v is None and is_section(annotation_at(model, [k]))]
    _merge(merged, {key: data[key] for key in data if key not in empty}, file, to)
    if is_saved_run(Path(file)) and _names_a_folder(data.get("run")):
        merged["run"]["dir"] = str(Path(file).parent)
    if "out" in data and is_saved_distillation(Path(file)):
        merged["out"] = str(Path(file).parent)


def _names_a_folder(run: Any) -> bool:
    return isinstance(run, Mapping) and isinstance(run.get("dir"), str)


def is_saved_run(file: Path) -> bool:
    """Whether a file is the configuration that a run saved in its folder."""
    return file.name == CONFIG and file.with_name(METRICS).exists()


def is_saved_distillation(file: Path) -> bool:
    """Whether a file is the configuration that a distillation saved in its folder."""
    return file.name == CONFIG and file.with_name(TRACES).exists()


def _merge(
    into: dict[str, Any], new: Mapping[str, Any], source: str, origins: Origins, at: KeyPath = ()
) -> None:
    for key, value in new.items():
        path = (*at, key)
        origins[path] = source
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, source, origins, path)
        else:
            into[key] = value
