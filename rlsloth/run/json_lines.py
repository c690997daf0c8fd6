"""JSON lines: rows of a file to which a run appends, where a crash may tear the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rlsloth.errors import UserError, first_line, naming_writes
from rlsloth.files import finite

Parsed = TypeVar("Parsed")


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """The rows as JSON, one a line; NaN and infinities become null."""
    return "".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows).encode()


def append_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file; they are on disk when this returns.

    Raises:
        WriteError: the file system refuses; none of the rows stays in the file.
    """
    data = json_lines(rows)
    size = path.stat().st_size if path.exists() else 0
    with naming_writes(path, lambda: len(data)):
        try:
            with open(path, "ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            if path.exists():
                os.truncate(path, size)
            raise


def read_json_lines(path: Path, parse: Callable[[Any], Parsed], remedy: str) -> Iterator[Parsed]:
    """Read the lines of a file in order; nothing if there is no file.

    Args:
        parse: makes a value of a line's JSON; it raises for a damaged line.
        remedy: what the user can do about a damaged line.

    A last line without its line end, which a crash tore, is left out, and so are blank lines.

    Raises:
        UserError: a damaged line.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            if not line.strip():
                continue
            try:
                parsed = parse(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{path} line {number} is damaged ({first_line(error)}): {remedy}"
                ) from None
            yield parsed


def truncate_torn_line(path: Path) -> None:
    """Remove a last line without its line end, which a crash tore."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(whole)
