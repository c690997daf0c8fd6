"""Read the rows of one file: JSON lines, JSON, parquet, Arrow, CSV or TSV, also packed by gzip."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from rlsloth.data.text import is_text, parse_json
from rlsloth.errors import UserError, first_line

Row = dict[str, Any]
Refuse = Callable[[UserError], None]
"""Function that is given a malformed row; it raises, or the row is left out."""
FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".gz")
LINES_FIRST = (".jsonl", ".json", ".parquet", ".arrow")
"""Kinds that are read in a folder with files of several kinds."""
_KINDS = {".jsonl": ".jsonl", ".ndjson": ".jsonl", ".json": ".json", ".parquet": ".parquet",
          ".arrow": ".arrow", ".csv": ".csv", ".tsv": ".tsv"}  # fmt: skip
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_CELL = sys.maxsize >> 32


def kind_of(path: Path) -> str | None:
    """Name the format of a file by its ending, without .gz; None if it cannot be read."""
    if path.suffix == ".gz":
        kind = _KINDS.get(Path(path.stem).suffix)
        return None if kind in (".parquet", ".arrow") else kind
    return _KINDS.get(path.suffix)


def read_file(path: Path, refuse: Refuse | None = None) -> Iterator[Row]:
    """Read the rows of a file whose kind is known.

    Args:
        path: the file.
        refuse: is given malformed lines. Default: they are raised.

    Raises:
        UserError: the file or a row is malformed; the message names the line or row.
    """
    refuse = refuse or _raise
    readers = {
        ".jsonl": lambda: _read_json_lines(path, refuse),
        ".json": lambda: _read_json(path, refuse),
        ".parquet": lambda: _read_parquet(path, refuse),
        ".arrow": lambda: _read_arrow(path, refuse),
        ".csv": lambda: _read_table(path, ",", refuse),
        ".tsv": lambda: _read_table(path, "\t", refuse),
    }
    kind = kind_of(path)
    assert kind is not None, f"{path}: the caller has checked the kind"
    return guarded(
        readers[kind], f"{path}: cannot read this {kind[1:]} file", "copy or write it again"
    )


def guarded(read: Callable[[], Iterator[Row]], what: str, remedy: str) -> Iterator[Row]:
    """Turn any exception of the library that reads the rows into a UserError of one line."""
    number = 0
    try:
        for row in read():
            yield row
            number += 1
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # libraries and their plugins raise errors of every type
        place = f" after row {number}" if number else ""
        raise UserError(
            f"{what}{place}: {type(error).__name__}: {first_line(error)}; {remedy}"
        ) from error


def _raise(error: UserError) -> None:
    raise error


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _read_json(path: Path, refuse: Refuse) -> Iterator[Row]:
    """Read a .json file: an array of rows, ``{"data": [...]}``, or JSON lines."""
    with _open(path) as file:
        filled = (line for line in file if line.strip())
        first, second = next(filled, b""), next(filled, b"")
    row = _object(first.removeprefix(_BYTE_ORDER_MARK))
    if not first or (row is not None and (second or not isinstance(row.get("data"), list))):
        yield from _read_json_lines(path, refuse)
        return
    with _open(path) as file:
        value = parse_json(file.read().removeprefix(_BYTE_ORDER_MARK), str(path))
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(
            f'{path}: expected an array of rows, {{"data": [...]}}, or one JSON object on each '
            f"line, this is {type(value).__name__}; convert it to one of these"
        )
    for number, item in enumerate(rows, 1):
        yield from _checked(item, f"{path} row {number}", refuse)


def _object(line: bytes) -> Row | None:
    """Parse a line as a JSON object; None if it is something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_json_lines(path: Path, refuse: Refuse) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            where = f"{path} line {number}"
            if not text.strip():
                continue
            try:
                value = parse_json(text, where)
            except UserError as error:
                refuse(error)
                continue
            yield from _checked(value, where, refuse)


def _checked(row: Any, where: str, refuse: Refuse) -> Iterator[Row]:
    """Yield a row if it is an object with names that are text."""
    try:
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be a JSON object, this is a {type(row).__name__}")
        for key in row:
            if not key.isascii() and not is_text(key):
                raise UserError(
                    f"{where}: the name of column {key!r} holds half of a surrogate pair, which "
                    "is not text; rename it"
                )
    except UserError as error:
        refuse(error)
        return
    yield row


def _read_parquet(path: Path, refuse: Refuse) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        start = 1
        for batch in file.iter_batches():
            yield from _batch_rows(batch, path, start, refuse)
            start += batch.num_rows


def _read_arrow(path: Path, refuse: Refuse) -> Iterator[Row]:
    """Read a file of Arrow's stream or file format."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(source).read_all()
        start = 1
        for batch in table.to_batches():
            yield from _batch_rows(batch, path, start, refuse)
            start += batch.num_rows


def _batch_rows(batch: Any, path: Path, start: int, refuse: Refuse) -> Iterator[Row]:
    """Convert a batch to rows; a text that is not UTF-8 is named by its row and column."""
    try:
        rows: list[Row] = batch.to_pylist()
    except UnicodeDecodeError:
        rows = []
        for number in range(batch.num_rows):
            row: Row = {}
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    row[name] = column[number].as_py()
                except UnicodeDecodeError as error:
                    where = f"{path} row {start + number}, column {name!r}"
                    text = f"not UTF-8 at byte {error.start} of its text"
                    refuse(UserError(f"{where}: {text}; write the file again with text in UTF-8"))
                    break
            else:
                rows.append(row)
    yield from map(without_nulls, rows)


def without_nulls(row: Row) -> Row:
    """Drop the keys that Arrow has added to messages and tools: every one gets the keys of all.

    Other dicts keep theirs: a reward may look for them.
    """
    return {
        k: [_dropped(item) if _is_chat(item) else item for item in v] if isinstance(v, list) else v
        for k, v in row.items()
    }


def _is_chat(value: Any) -> bool:
    """Whether a value is a message, a tool or a call of one."""
    if not isinstance(value, dict):
        return False
    keys = set(value)
    named = "name" in keys and keys & {"arguments", "parameters"}
    return bool(keys & {"role", "from", "function"} or named)


def _dropped(value: Any) -> Any:
    if isinstance(value, list):
        return [_dropped(item) for item in value]
    if isinstance(value, dict):
        return {k: _dropped(v) for k, v in value.items() if v is not None}
    return value


def _read_table(path: Path, separator: str, refuse: Refuse) -> Iterator[Row]:
    """Read a table of text with a header. Every value is text, or None for an empty cell."""
    csv.field_size_limit(_LONGEST_CELL)
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        header = file.readline()
        file.seek(0)
        if separator.encode() not in header and b";" in header:  # of spreadsheets in some countries
            separator = ";"
        table = csv.reader(text, delimiter=separator, strict=True)
        names: list[str] = []
        try:
            for cells in table:
                where = f"{path} line {table.line_num}"
                if not names:
                    names = _header(cells, where)
                elif cells:
                    yield from _cells(names, cells, where, refuse)
        except UnicodeDecodeError:
            raise UserError(
                f"{path}: not UTF-8 near line {table.line_num + 1}; save the file in UTF-8"
            ) from None
        except csv.Error as error:
            raise UserError(f"{path} line {table.line_num}: {error}; correct it") from None


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() or f"Unnamed: {i}" for i, cell in enumerate(cells)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: the header has the column {twice[0]!r} twice; rename one")
    return names


def _cells(names: list[str], cells: list[str], where: str, refuse: Refuse) -> Iterator[Row]:
    if len(cells) > len(names):
        error = f"{where}: {len(cells)} cells under a header of {len(names)}"
        refuse(UserError(f"{error}; put text with separators in quotes"))
        return
    filled = [cell or None for cell in cells] + [None] * (len(names) - len(cells))
    yield dict(zip(names, filled, strict=True))
