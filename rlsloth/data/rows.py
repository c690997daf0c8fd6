"""Read the rows of a dataset: JSON lines, JSON, parquet, folders of these, or the hub."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlsloth.errors import UserError, first_line, nearest
from rlsloth.plugins import is_passed, passed

Row = dict[str, Any]
FILES = (".jsonl", ".json", ".parquet")
OTHER_FILES = (".arrow", ".csv", ".gz", ".tsv", ".txt", ".xlsx", ".yaml", ".zip", ".zst")
"""Endings of files that cannot be read, listed so that such a path is not taken for a hub id."""
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PASS_A_FILE = "pass a .jsonl, .json or .parquet file instead"


def load_rows(source: str, split: str = "train", limit: int | None = None) -> list[Row]:
    """Read the rows of a dataset.

    Args:
        source: a .jsonl, .json or .parquet file, a folder of them, a hub id, ``id[:config]``, or
            the name of rows passed from Python.
        split: split of a hub dataset, or of a folder whose files are named after splits
            (train.jsonl).
        limit: largest number of rows; None for all.

    Raises:
        UserError: the dataset is missing or empty, or a row is malformed (file and line are named).
    """
    path = Path(source).expanduser()
    rows: Iterator[Row]
    if is_passed(source):
        rows = iter(passed(source, "dataset"))
    elif path.is_dir():
        rows = itertools.chain.from_iterable(map(_read_file, _files_of(path, split)))
    elif path.suffix in FILES + OTHER_FILES or source.startswith((".", "/", "~")) or path.is_file():
        rows = _read_file(path)
    else:
        rows = _read_hub(source, split)
    found = list(itertools.islice(rows, limit))
    if not found:
        raise UserError(f"dataset {source!r} (split {split!r}) has no rows; pass another one")
    return found


def _files_of(folder: Path, split: str) -> list[Path]:
    """List a folder's data files.

    If files are named after splits (train-00.parquet), only those of ``split`` are listed.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in FILES)
    if not files:
        raise UserError(f"folder {folder} has no {', '.join(FILES)} file; pass another folder")
    split_of = {p: re.split(r"[-_.]", p.name)[0] for p in files}
    if not SPLITS & set(split_of.values()):
        return files
    chosen = [p for p in files if split_of[p] == split]
    if not chosen:
        raise UserError(
            f"folder {folder} has no file of split {split!r}"
            f"{nearest(split, list(split_of.values()))} (files: "
            f"{', '.join(p.name for p in files)})"
        )
    return chosen


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix not in FILES:
        raise UserError(f"{path}: cannot read files of this kind; convert it to {', '.join(FILES)}")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*") if p.suffix in FILES]
        raise UserError(
            f"there is no data file {path}{nearest(path.name, siblings)} (current folder: "
            f"{Path.cwd()})"
        )
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return _read_json(path) if path.suffix == ".json" else _read_json_lines(path)


def _read_json(path: Path) -> Iterator[Row]:
    """Read a .json file: an array of rows, ``{"data": [...]}``, or JSON lines."""
    with path.open("rb") as file:
        filled = (line for line in file if line.strip())
        first, second = next(filled, b""), next(filled, b"")
    row = _object(first.removeprefix(_BYTE_ORDER_MARK))
    if not first or (row is not None and (second or not isinstance(row.get("data"), list))):
        return _read_json_lines(path)
    value = parse_json(path.read_bytes().removeprefix(_BYTE_ORDER_MARK), str(path))
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(
            f'{path}: expected an array of rows, {{"data": [...]}}, or one JSON object on each '
            f"line, this is {type(value).__name__}; convert it to one of these"
        )
    return (_row(row, f"{path} row {number}") for number, row in enumerate(rows, 1))


def _object(line: bytes) -> Row | None:
    """Parse a line as a JSON object; None if it is something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if text.strip():
                yield _row(parse_json(text, f"{path} line {number}"), f"{path} line {number}")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: cannot read this parquet file: {first_line(error)}; copy or write it again"
        ) from error


def _read_hub(source: str, split: str) -> Iterator[Row]:
    import datasets
    import huggingface_hub

    name, _, config = source.partition(":")
    try:
        # Without a network, load_dataset would retry for half a minute; one request fails at once.
        if not _cached(name, Path(datasets.config.HF_DATASETS_CACHE)):
            huggingface_hub.HfApi().dataset_info(name, timeout=10)
        data = datasets.load_dataset(name, config or None, split=split)
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub has no dataset {name!r}, or it needs a login: check the name, or "
            f"{_PASS_A_FILE}"
        ) from None
    except ValueError as error:  # not a hub id, or no such config or split, which the text lists
        raise UserError(
            f"cannot load dataset {source!r}, split {split!r}: {first_line(error)}; check the name "
            f"and the split, or {_PASS_A_FILE}"
        ) from error
    except Exception as error:  # errors of the hub's HTTP library, which changes
        raise UserError(
            f"cannot load dataset {source!r} (no network? {first_line(error)}): {_PASS_A_FILE}"
        ) from error
    return iter(data)


def _cached(name: str, cache: Path) -> bool:
    """Tell whether the library datasets has this dataset in its cache.

    The cache has a folder for each, named owner___name_in_snake_case.
    """
    plain = name.replace("/", "").replace("_", "").lower()
    return any(p.name.replace("_", "").lower() == plain for p in cache.glob("*"))


def parse_json(text: bytes, where: str) -> Any:
    """Parse JSON.

    Args:
        text: JSON in UTF-8.
        where: place of the text, for messages.

    Raises:
        UserError: the text is not JSON; the message names the place in it.
    """
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 at byte {error.start}; save the file in UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise UserError(f"{where}: not JSON ({error.msg}, {place}); correct it") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number too long
        raise UserError(f"{where}: cannot read this JSON: {first_line(error)}") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row must be a JSON object, this is a {type(value).__name__}")
    return value
