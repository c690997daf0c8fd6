"""Messages about refused values: one line each, with source, key, value and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlsloth.cli.config_files import Origins
from rlsloth.cli.foreign_names import replacements
from rlsloth.cli.keys import KeyPath, annotation_at, fields, is_section, known_keys, options, spelt
from rlsloth.config import Section

SHOWN = 60
"""Most characters of a value in a message."""


def explain(
    error: ValidationError,
    model: type[Section],
    origins: Origins,
    help_command: str,
    more_options: Sequence[str] = (),
) -> Iterator[str]:
    """One line for each value that pydantic refused.

    Args:
        help_command: the command that lists the options, such as ``rlsloth grpo --help``.
        more_options: names of options that the model does not have, for suggestions.
    """
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        by_path.setdefault(_given_path(item, origins), []).append(item)
    for path, items in by_path.items():
        source = origins.get(path, "")
        if items[0]["type"] == "extra_forbidden":
            yield _unknown(path, source, model, help_command, more_options)
        elif not path:
            yield _text(items[0])
        elif items[0]["type"] == "value_error" and is_section(annotation_at(model, path)):
            # Its settings contradict each other.
            section = ".".join(path)
            shown = section if source.startswith("--") else f"{source}: {section}"
            yield f"{shown}: {_text(items[0])}"
        else:
            wanted = " or ".join(dict.fromkeys(_wanted(item) for item in items))
            wanted += "".join(_did_you_mean_value(item) for item in items)
            shown = _shown(path, source, items[0]["input"])
            yield f"{shown}: {wanted}{_reason(model, path)}"


def _given_path(item: ErrorDetails, origins: Origins) -> KeyPath:
    """Key path that the user set, from an error's location, which also names members of unions."""
    loc = tuple(str(part) for part in item["loc"])
    while loc and loc not in origins:
        loc = loc[:-1]
    return loc


def _unknown(
    path: KeyPath,
    source: str,
    model: type[Section],
    help_command: str,
    more_options: Sequence[str],
) -> str:
    if source.startswith("--"):
        names = [spelt(name) for name in (*options(model), *more_options)]
        hint = _did_you_mean(spelt(source[2:])[2:], [name[2:] for name in names], "--")
        return f"{source}: unknown option{hint or f' (see {help_command})'}"
    key = ".".join(path)
    hint = _did_you_mean(key, list(known_keys(model)))
    return f"{source}: unknown key {key}{hint or f' (see {help_command})'}"


def _did_you_mean(key: str, known: list[str], dashes: str = "") -> str:
    """A suggestion: the key of that name in another section, the option that does the work of
    another trainer's option, else the nearest key."""
    section, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    near = [k for k in known if k.rpartition(".")[2] == leaf]
    near = near or replacements(key, known)
    near = near or [siblings[n] for n in difflib.get_close_matches(leaf, siblings, 1, 0.6)]
    near = near or difflib.get_close_matches(key, known, 1, 0.5)
    return "; did you mean " + " or ".join(f"'{dashes}{k}'" for k in near) + "?" if near else ""


def _shown(path: KeyPath, source: str, value: Any) -> str:
    """Source, key and value; the name of a flag is both source and key."""
    if source.startswith("--"):
        return f"{source} {_short(value if value != '' else repr(value))}"
    return f"{source}: {'.'.join(path)} = {_short(repr(value))}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _wanted(item: ErrorDetails) -> str:
    """Text of what is allowed instead."""
    if item["type"] == "model_type":
        return "must be a section, with its keys indented below it"
    if item["type"] == "missing":
        return "has too few values"
    if item["type"] in ("bool_parsing", "bool_type"):
        return "must be true or false"
    return _text(item).replace("Input should be", "must be", 1)


def _did_you_mean_value(item: ErrorDetails) -> str:
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"])
    close = difflib.get_close_matches(item["input"], allowed, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _text(item: ErrorDetails) -> str:
    return item["msg"].removeprefix("Value error, ")


def _reason(model: type[Section], path: KeyPath) -> str:
    """The field's docstring in parentheses, which explains the option."""
    section = annotation_at(model, path[:-1])
    field = fields(section).get(path[-1]) if is_section(section) else None
    return f" ({' '.join(field.description.split())})" if field and field.description else ""
