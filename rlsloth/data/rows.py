"""Read the rows of a dataset: files, folders, the hub, or rows that were passed from Python."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsloth.data.folders import files_of_split
from rlsloth.data.formats import FILES, kind_of, read_file, without_nulls
from rlsloth.data.hub import is_saved, read_hub, read_saved
from rlsloth.data.text import is_text
from rlsloth.errors import UserError, nearest
from rlsloth.plugins import is_passed, passed

Row = dict[str, Any]
OTHER_FILES = (".arrow", ".gz", ".txt", ".xls", ".xlsx", ".yaml", ".zip", ".zst")
"""Endings of files that cannot be read, listed so that such a path is not taken for a hub id."""


@dataclass(slots=True)
class BadRows:
    """Rows that cannot be read: refused, or left out and counted."""

    section: str = "data"
    """Section of the configuration with the option ``bad_rows``, for messages."""
    skip: bool = False
    """Leave such rows out."""
    bad: list[str] = field(default_factory=list)
    """The reason for each row that was left out."""

    def refuse(self, error: UserError) -> None:
        """Note a bad row. Raises UserError if bad rows are not left out."""
        if not self.skip:
            raise UserError(
                f"{error} (or leave such rows out with --{self.section}.bad-rows skip)"
            ) from None
        self.bad.append(str(error))


def load_rows(
    source: str, split: str = "train", limit: int | None = None, bad: BadRows | None = None
) -> list[Row]:
    """Read the rows of a dataset.

    Args:
        source: a file, a pattern of files (``data/*.jsonl``), a folder, a hub id ``id[:config]``,
            several of these with commas between, or the name of rows passed from Python.
        split: split of a hub dataset, or of a folder with splits (train.jsonl).
        limit: largest number of rows; None for all.
        bad: decides about malformed lines. Default: they are refused.

    Raises:
        UserError: the dataset is missing or empty, or a row is malformed (file and line are named).
    """
    parts = sources(source)
    rows = itertools.chain.from_iterable(_read(part, split, bad) for part in parts)
    found = list(itertools.islice(rows, limit))
    if not found:
        left = f"; the first bad one: {bad.bad[0]}" if bad is not None and bad.bad else ""
        raise UserError(f"dataset {source!r} (split {split!r}) has no rows{left}; pass another one")
    return found


def sources(source: str) -> list[str]:
    """Split the name of a dataset at its commas, and replace patterns by the files they match."""
    if is_passed(source) or Path(source).expanduser().exists():
        return [source]
    parts = [part.strip() for part in source.split(",") if part.strip()]
    return list(itertools.chain.from_iterable(map(_matching, parts))) or [source]


def _matching(source: str) -> list[str]:
    path = Path(source).expanduser()
    if not glob.has_magic(source) or path.exists():
        return [source]
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise UserError(f"no file matches {source!r} (current folder: {Path.cwd()})")
    return found


def _read(source: str, split: str, bad: BadRows | None) -> Iterator[Row]:
    """Read one file, folder or hub dataset."""
    if is_passed(source):
        return _passed_rows(source)
    path = Path(source).expanduser()
    folder, _, config = source.rpartition(":")
    if path.is_dir():
        return _read_folder(path, None, split, bad)
    if folder and Path(folder).expanduser().is_dir():
        return _read_folder(Path(folder).expanduser(), config, split, bad)
    if _is_path(source, path):
        return _read_one(path, bad)
    return read_hub(source, split)


def _is_path(source: str, path: Path) -> bool:
    known = path.suffix in OTHER_FILES or kind_of(path) is not None
    return known or source.startswith((".", "/", "~")) or path.is_file()


def _passed_rows(source: str) -> Iterator[Row]:
    rows: Iterable[Row] = passed(source, "dataset")
    for number, row in enumerate(rows, 1):
        for key in row:
            if not isinstance(key, str) or not is_text(key):
                raise UserError(
                    f"row {number}: the names of columns are text, but one is {key!r}; rename it"
                )
        yield without_nulls(row)


def _read_folder(
    folder: Path, config: str | None, split: str, bad: BadRows | None
) -> Iterator[Row]:
    """Read a folder of save_to_disk, or of files."""
    if is_saved(folder):
        return read_saved(folder, split)
    files = files_of_split(folder, config, split)
    return itertools.chain.from_iterable(_read_one(path, bad) for path in files)


def _read_one(path: Path, bad: BadRows | None) -> Iterator[Row]:
    """Read a file of a known kind."""
    if kind_of(path) is None:
        raise UserError(f"{path}: cannot read files of this kind; convert it to {', '.join(FILES)}")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*") if kind_of(p)]
        raise UserError(
            f"there is no data file {path}{nearest(path.name, siblings)} (current folder: "
            f"{Path.cwd()})"
        )
    return read_file(path, (bad or BadRows()).refuse if bad else None)
