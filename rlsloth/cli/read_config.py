"""Command line to a validated config: YAML files, then flags, later wins, all errors at once."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import tyro
import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlsloth.config import Section
from rlsloth.distillation.raw import FILE as TRACES
from rlsloth.errors import UserError
from rlsloth.run.folder import CONFIG, METRICS

Config = TypeVar("Config", bound=Section)
KeyPath = tuple[str, ...]
Origins = dict[KeyPath, str]
"""Where each value was given: a file's name, or the flag as typed."""

_YAML_SUFFIXES = (".yaml", ".yml")
_BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0"}


def read_config(
    model: type[Config], argv: Sequence[str], prog: str = "rlsloth", about: str | None = None
) -> Config:
    """Merge the YAML files named in ``argv``, then its flags, over the model's defaults.

    Files (``*.yaml``, anywhere) merge deeply from left to right. Flags come after all files:
    ``--section.key value`` or ``--section.key=value``. Lists take several values
    (``--rewards a b``). ``--env.params min_terms 2 max_terms 2`` sets the whole mapping, and
    ``--env.params.min_terms 2`` one key of it. The config.yaml of a run or a distillation means the
    folder it lies in, wherever that was moved. ``about`` heads the help; default: the model's
    docstring.

    Raises:
        UserError: one line for every problem: where it stands, the key, the value, what is allowed.
        SystemExit: 0, after ``--help``.
    """
    if {"-h", "--help"} & set(argv):
        _print_help(model, prog, about or model.__doc__)
    problems: list[str] = []
    merged: dict[str, Any] = {}
    origins: Origins = {}
    files, flags = _split(argv, model, problems)
    for file in files:
        data = _read_yaml(file, model, problems)
        _merge(merged, data, file, origins)
        if _names_its_folder(Path(file), data):
            merged["run"]["dir"] = str(Path(file).parent)
        if "out" in data and Path(file).name == CONFIG and Path(file).with_name(TRACES).exists():
            merged["out"] = str(Path(file).parent)
    for path, value, flag in flags:
        _assign(merged, path, value, flag, origins)
    config = None
    try:
        config = model.model_validate(merged)
    except ValidationError as error:
        problems += _explain(error, model, origins, f"{prog} --help")
    if problems or config is None:
        raise UserError("\n".join(problems))
    return config


def holds(file: Path, key: str) -> bool:
    """Whether a YAML file is a mapping with this key; what is wrong with it is not said here."""
    data = _read_yaml(str(file), Section, [])
    return key in data


def _print_help(model: type[Section], prog: str, about: str | None) -> None:
    tyro.cli(
        model,
        args=["--help"],
        prog=f"{prog} [FILE.yaml ...]",
        description=f"{about}\n\nFiles merge from left to right, flags win over files.",
        config=(tyro.conf.FlagConversionOff,),
    )


# --- files ---------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, and reads 3e-5 as a number (text in YAML 1.1)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                hint = f"key {key!r} is not text; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, hint, key_node.start_mark)
            if key in seen:
                hint = f"key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, hint, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _read_yaml(file: str, model: type[Section], problems: list[str]) -> dict[str, Any]:
    try:
        data = yaml.load(Path(file).read_bytes(), Loader=_Loader)
    except OSError as error:
        problems.append(f"{file}: cannot read it: {error.strerror} (looked from {Path.cwd()})")
        return {}
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problems.append(f"{file}{line}: {error.problem or error.context}")
        return {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(f"{file}: not YAML: {str(error).splitlines()[0]}")
        return {}
    if data is None:
        return {}
    if not isinstance(data, dict):
        problems.append(f"{file}: holds a {type(data).__name__}; it must be a mapping of keys")
        return {}
    # A section whose keys are all commented out reads as null.
    return {k: v for k, v in data.items() if v is not None or not _is_section(_kind(model, [k]))}


def _names_its_folder(file: Path, data: Mapping[str, Any]) -> bool:
    """Whether this is the saved configuration of a run, which names the folder it was written to:
    from where the command ran, and before the folder was moved."""
    run = data.get("run")
    in_run = file.name == CONFIG and (file.parent / METRICS).exists()
    return in_run and isinstance(run, Mapping) and isinstance(run.get("dir"), str)


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


def _assign(
    into: dict[str, Any], path: Sequence[str], value: Any, flag: str, origins: Origins
) -> None:
    for depth, key in enumerate(path[:-1], 1):
        origins[tuple(path[:depth])] = flag
        if not isinstance(into.get(key), dict):
            into[key] = {}
        into = into[key]
    into[path[-1]] = value
    origins[tuple(path)] = flag


# --- flags ---------------------------------------------------------------------------------------


def _split(
    argv: Sequence[str], model: type[Section], problems: list[str]
) -> tuple[list[str], list[tuple[list[str], Any, str]]]:
    """Config files, and (key path, value, flag as typed) for each flag."""
    files: list[str] = []
    flags: list[tuple[list[str], Any, str]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.endswith(_YAML_SUFFIXES) and not word.startswith("-"):
            files.append(word)
            continue
        if not word.startswith("--") or word == "--":
            problems.append(
                f"unexpected argument {word!r}: config files end in .yaml, options begin with --"
            )
            continue
        name, equals, inline = word.partition("=")
        path = _key_path(model, name[2:])
        kind = _kind(model, path)
        if _is_section(kind):
            problems.append(f"{name} is a section: set one of its keys, as in {name}.KEY VALUE")
            _take_all(words)
            continue
        try:
            value = _value(kind, [inline], True) if equals else _value(kind, words, False)
        except ValueError as error:
            problems.append(f"{name} {error}")
            continue
        flags.append((path, value, name))
    return files, flags


def _key_path(model: type[Section], name: str) -> list[str]:
    """Keys of a dotted name; ``-`` is ``_`` in names of fields, but stays in keys of mappings."""
    path: list[str] = []
    for part in name.split("."):
        inside_mapping = bool(path) and get_origin(_kind(model, path)) is dict
        path.append(part if inside_mapping else part.replace("-", "_"))
    return path


def _kind(model: type[Section], path: Sequence[str]) -> Any:
    """Annotation at a key path, or None when there is no such key."""
    kind: Any = model
    for key in path:
        if _is_section(kind):
            field = kind.model_fields.get(key)
            kind = field.annotation if field else None
        else:
            kind = get_args(kind)[1] if get_origin(kind) is dict else None
    return kind


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _value(kind: Any, words: list[str], inline: bool) -> Any:
    """Take a flag's value off the front of ``words``. Text stays text: pydantic converts it."""
    is_union = get_origin(kind) in (Union, types.UnionType)
    members = get_args(kind) if is_union else (kind,)
    some = [m for m in members if m is not types.NoneType]
    container = get_origin(some[0])
    optional = len(some) < len(members)
    if kind is None:  # an unknown flag: pydantic reports it
        return " ".join(words if inline else _take_all(words))
    if container is dict:
        return _pairs(get_args(some[0])[1], words if inline else _take_all(words))
    if container in (list, tuple):
        taken = words if inline else _take_all(words)
        return None if optional and _says_none(taken) else taken
    if some == [bool]:
        return words.pop(0) if inline or (words and words[0].lower() in _BOOLEANS) else True
    if not inline and (not words or words[0].startswith("--")):
        raise ValueError("needs a value")
    word = words.pop(0)
    if optional and _says_none([word]):
        return None
    return _typed(word) if len(some) > 1 else word


def _pairs(kind: Any, words: list[str]) -> dict[str, Any]:
    if get_origin(kind) is dict:
        raise ValueError("needs one name more, as in --reward.params.length target 200")
    if len(words) % 2:
        raise ValueError(f"takes pairs of key and value, but got {len(words)} words: {words}")
    return {key: _typed(word) for key, word in zip(words[::2], words[1::2], strict=True)}


def _typed(word: str) -> bool | int | float | str:
    """What YAML reads: ``2`` is a number, ``true`` a bool; all but plain scalars stays text."""
    try:
        value = yaml.load(word, Loader=_Loader)
    except yaml.YAMLError:
        return word
    return value if isinstance(value, bool | int | float | str) else word


def _says_none(words: list[str]) -> bool:
    return len(words) == 1 and words[0].lower() in ("none", "null")


def _take_all(words: list[str]) -> list[str]:
    """Remove and return the words up to the next flag or config file."""
    taken = []
    while words and not words[0].startswith("--") and not words[0].endswith(_YAML_SUFFIXES):
        taken.append(words.pop(0))
    return taken


# --- errors --------------------------------------------------------------------------------------


def _explain(
    error: ValidationError, model: type[Section], origins: Origins, more: str
) -> Iterator[str]:
    """One line for each value that was refused."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        by_path.setdefault(_given_path(item, origins), []).append(item)
    known = list(_known_keys(model))
    options = [name for name in known if not _is_section(_kind(model, name.split(".")))]
    for path, items in by_path.items():
        key = ".".join(path)
        source = origins.get(path, "")
        is_flag = source.startswith("--")
        item = items[0]
        if item["type"] == "extra_forbidden" and is_flag:
            spelt = [name.replace("_", "-") for name in options]
            hint = _did_you_mean(source[2:].replace("_", "-"), spelt, "--")
            yield f"{source}: unknown option{hint or f' (see {more})'}"
        elif item["type"] == "extra_forbidden":
            yield f"{source}: unknown key {key}{_did_you_mean(key, known) or f' (see {more})'}"
        elif not path:
            yield item["msg"].removeprefix("Value error, ")
        else:
            value = item["input"]
            shown = f"{source}: {key} = {_short(repr(value))}"
            if is_flag:
                shown = f"{source} {_short(value if value != '' else repr(value))}"
            wanted = " or ".join(dict.fromkeys(_wanted(i) for i in items))
            yield f"{shown}: {wanted}{_reason(model, path)}"


def _given_path(item: ErrorDetails, origins: Origins) -> KeyPath:
    """The longest given key path in an error's location (locations also name union members)."""
    loc = tuple(str(part) for part in item["loc"])
    while loc and loc not in origins:
        loc = loc[:-1]
    return loc


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if _is_section(field.annotation):
            assert isinstance(field.annotation, type)
            yield from _known_keys(field.annotation, f"{prefix}{name}.")


def _did_you_mean(key: str, known: list[str], dashes: str = "") -> str:
    """The key of that name in another section, else a sibling spelled alike, else any such key."""
    section, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    near = [k for k in known if k.rpartition(".")[2] == leaf]
    near = near or [siblings[n] for n in difflib.get_close_matches(leaf, siblings, 1, 0.6)]
    near = near or difflib.get_close_matches(key, known, 1, 0.5)
    return "; did you mean " + " or ".join(f"'{dashes}{k}'" for k in near) + "?" if near else ""


def _wanted(item: ErrorDetails) -> str:
    if item["type"] == "model_type":
        return "must be a section, with its keys indented below it"
    if item["type"] == "missing":
        return "has too few values"
    text: str = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        close = difflib.get_close_matches(item["input"], allowed, 1, 0.5)
        text += f"; did you mean {close[0]!r}?" if close else ""
    return text


def _reason(model: type[Section], path: KeyPath) -> str:
    """The field's docstring, which says what the value is for."""
    section = _kind(model, path[:-1])
    field = section.model_fields.get(path[-1]) if _is_section(section) else None
    return f" ({' '.join(field.description.split())})" if field and field.description else ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
