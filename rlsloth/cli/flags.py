"""Flags on the command line: ``--section.key value``, lists, mappings and switches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from rlsloth.cli.config_files import SUFFIXES, Origins, plain_scalar
from rlsloth.cli.keys import KeyPath, annotation_at, is_section, key_path, kind_of
from rlsloth.config import Section

_BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0"}


@dataclass(frozen=True, slots=True)
class Flag:
    """One option of the command line with its value."""

    path: KeyPath
    value: Any
    typed: str
    """The option as it was typed, without its value."""


@dataclass(slots=True)
class Words:
    """A command line, sorted into files and flags."""

    files: list[str] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One line for each word that is neither file nor flag, and for each missing value."""


def sort_words(argv: Sequence[str], model: type[Section]) -> Words:
    """Separate config files from flags, and read the value of each flag."""
    found, words = Words(), list(argv)
    while words:
        word = words.pop(0)
        if _is_file(word):
            found.files.append(word)
            continue
        if not word.startswith("--") or word == "--":
            found.problems.append(
                f"unexpected argument {word!r}: config files end in .yaml, options begin with --"
            )
            continue
        name, equals, inline = word.partition("=")
        path = key_path(model, name[2:])
        annotation = annotation_at(model, path)
        if is_section(annotation):
            found.problems.append(f"{name} is a section: set one of its keys: {name}.KEY VALUE")
            take_values(words)
            continue
        try:
            value = _value(annotation, [inline], True) if equals else _value(annotation, words)
        except ValueError as error:
            found.problems.append(f"{name} {error}")
            continue
        found.flags.append(Flag(path, value, name))
    return found


def take_values(words: list[str]) -> list[str]:
    """Remove and return the words up to the next flag or config file."""
    taken = []
    while words and not words[0].startswith("--") and not _is_file(words[0]):
        taken.append(words.pop(0))
    return taken


def separate(argv: Sequence[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """Split a command line: flags of these names with their values, and everything else."""
    own: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        key = word.partition("=")[0].removeprefix("--").replace("-", "_")
        mine = word.startswith("--") and key in names
        (own if mine else rest).extend([word, *take_values(words)])
    return own, rest


def with_first_word(argv: list[str], option: str) -> list[str]:
    """The command line with ``option`` before its first word, unless that word is an option."""
    return [option, *argv] if argv and not argv[0].startswith("-") else argv


def assign(into: dict[str, Any], flag: Flag, origins: Origins) -> None:
    """Set a flag's value in a nested mapping, and record its origin."""
    for depth, key in enumerate(flag.path[:-1], 1):
        origins[flag.path[:depth]] = flag.typed
        if not isinstance(into.get(key), dict):
            into[key] = {}
        into = into[key]
    into[flag.path[-1]] = flag.value
    origins[flag.path] = flag.typed


def repeated_lists(flags: Sequence[Flag]) -> list[str]:
    """One line for each option with several values that is passed twice, where the last would win
    and drop the values before it in silence."""
    problems = []
    first: dict[KeyPath, Flag] = {}
    for flag in flags:
        before = first.setdefault(flag.path, flag)
        if before is not flag and isinstance(flag.value, list) and isinstance(before.value, list):
            both = " ".join([*before.value, *flag.value])
            problems.append(f"{flag.typed} is passed twice: pass it once, {flag.typed} {both}")
    return problems


def _is_file(word: str) -> bool:
    return word.endswith(SUFFIXES) and not word.startswith("-")


def _value(annotation: Any, words: list[str], inline: bool = False) -> Any:
    """Remove a flag's value from the front of ``words``. Text stays text: pydantic converts it.

    Raises:
        ValueError: no value, or a key without a value.
    """
    kind = kind_of(annotation)
    if annotation is None:  # an unknown flag: pydantic reports it
        return " ".join(words if inline else take_values(words))
    if kind.container is dict:
        return _pairs(get_args(kind.type)[1], words if inline else take_values(words))
    if kind.container is not None:
        taken = words if inline else take_values(words)
        return None if kind.optional and _is_none(taken) else taken
    if kind.type is bool and not kind.union:
        return words.pop(0) if inline or (words and words[0].lower() in _BOOLEANS) else True
    if not inline and (not words or words[0].startswith("--")):
        raise ValueError("needs a value")
    word = words.pop(0)
    if kind.optional and _is_none([word]):
        return None
    return plain_scalar(word) if kind.union else word


def _pairs(annotation: Any, words: list[str]) -> dict[str, Any]:
    """A mapping of alternating keys and values. Raises ValueError."""
    if get_origin(annotation) is dict:
        raise ValueError("needs REWARD NAME VALUE, as in --reward.params.length target 200")
    if len(words) % 2:
        raise ValueError(f"needs pairs of key and value, but got {len(words)} words: {words}")
    pairs = zip(words[::2], words[1::2], strict=True)
    return {key: plain_scalar(word) for key, word in pairs}


def _is_none(words: list[str]) -> bool:
    return len(words) == 1 and words[0].lower() in ("none", "null")
