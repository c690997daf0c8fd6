"""Reading a command line into a validated configuration: YAML files, then flags; later ones win."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from rlsloth.cli.config_files import Origins, merge_file, read_yaml
from rlsloth.cli.explain import explain
from rlsloth.cli.flags import assign, repeated_lists, separate, sort_words
from rlsloth.cli.help import print_help
from rlsloth.cli.keys import fields, options
from rlsloth.config import Section
from rlsloth.errors import UserError

Config = TypeVar("Config", bound=Section)
Own = TypeVar("Own", bound=Section)


def read_config(
    model: type[Config], argv: Sequence[str], prog: str = "rlsloth", about: str | None = None
) -> Config:
    """Merge the YAML files named in ``argv``, then its flags, over the model's defaults.

    Files (``*.yaml``, anywhere) merge key by key from left to right. Flags win over all files:
    ``--section.key value`` or ``--section.key=value``. Lists take several values
    (``--rewards a b``). ``--env.params min_terms 2 max_terms 2`` sets the whole mapping, and
    ``--env.params.min_terms 2`` one key of it.

    Args:
        prog: the command as typed, for help and messages.
        about: text at the head of the help; default: the model's docstring.

    Raises:
        UserError: one line for each problem, with source, key, value and what is allowed.
        SystemExit: 0, after ``--help``.
    """
    if asks_for_help(argv):
        print_help([model], prog, about or model.__doc__ or "")
        raise SystemExit(0)
    return _read(model, argv, prog)


def read_config_and_own(
    model: type[Config], own: type[Own], argv: Sequence[str], prog: str, about: str
) -> tuple[Config, Own]:
    """Read a configuration, and separately the options of the command itself.

    Raises:
        UserError: one line for each problem of either.
        SystemExit: 0, after ``--help``.
    """
    if asks_for_help(argv):
        print_help([own, model], prog, about)
        raise SystemExit(0)
    mine, rest = separate(argv, set(fields(own)))
    problems: list[str] = []
    config = options_read = None
    try:
        options_read = _read(own, mine, prog)
    except UserError as error:
        problems.append(str(error))
    try:
        config = _read(model, rest, prog, options(own))
    except UserError as error:
        problems.append(str(error))
    if config is None or options_read is None:
        raise UserError("\n".join(problems))
    return config, options_read


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line has ``-h`` or ``--help``."""
    return bool({"-h", "--help"} & set(argv))


def _read(
    model: type[Config], argv: Sequence[str], prog: str, more_options: Sequence[str] = ()
) -> Config:
    merged: dict[str, Any] = {}
    origins: Origins = {}
    words = sort_words(argv, model)
    problems = list(words.problems)
    for file in words.files:
        try:
            merge_file(merged, file, read_yaml(file), model, origins)
        except UserError as error:
            problems.append(str(error))
    problems += repeated_lists(words.flags)
    for flag in words.flags:
        assign(merged, flag, origins)
    config = None
    try:
        config = model.model_validate(merged)
    except ValidationError as error:
        problems += explain(error, model, origins, f"{prog} --help", more_options)
    if problems or config is None:
        raise UserError("\n".join(problems))
    return config
