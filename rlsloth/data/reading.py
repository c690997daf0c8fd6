"""The reading of a dataset: rows that are left out, and the use that each column finds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

from rlsloth.config import DatasetConfig
from rlsloth.data.rows import BadRows, Row
from rlsloth.errors import UserError

NAMED = 3
"""Number of bad rows that are named; the others are only counted."""
MANY = 1000
"""Number of rows from which threads are worth their start."""
TOLD_SECONDS = 10.0
"""Time between two lines of progress."""
Read = TypeVar("Read")


@dataclass(slots=True)
class Reading(BadRows):
    """Options of reading rows, and findings that a run prints.

    Without options, the first bad row ends the reading.
    """

    limit: int | None = None
    """Largest number of tokens of an example; None: not known."""
    read: dict[str, None] = field(default_factory=dict)
    """Columns that were read, in order; several that are joined are one entry."""
    used: dict[str, None] = field(default_factory=dict)
    """Every column that somebody reads."""
    unused: dict[str, None] = field(default_factory=dict)
    """Columns that nobody reads."""
    keys: dict[str, None] = field(default_factory=dict)
    """Keys of messages that only a chat template may read."""
    remarks: dict[str, None] = field(default_factory=dict)
    """Other lines to print."""
    long_texts: set[str] = field(default_factory=set)
    """Places of plain texts that were cut or split."""

    @classmethod
    def of(cls, cfg: DatasetConfig, limit: int | None = None) -> Reading:
        """Begin a reading with the options of a section."""
        return cls(cfg.SECTION, skip=cfg.bad_rows == "skip", limit=limit)

    def each(
        self, rows: Iterable[Row], source: str, read: Callable[[int, Row], Read]
    ) -> Iterator[Read]:
        """Read row after row, given its number from 0; leave bad ones out if that is wanted.

        Many rows are read in threads, since tokenizers work outside Python, with a line of progress
        now and then. The results keep the rows' order.

        Raises:
            UserError: a row is bad and bad rows are not left out, or no row is left.
        """
        rows = list(rows)
        good, started = 0, time.monotonic()
        told = started
        with _mapped(partial(_outcome, read), rows) as outcomes:
            for count, outcome in enumerate(outcomes, 1):
                if time.monotonic() - told > TOLD_SECONDS:
                    told = time.monotonic()
                    left = (told - started) * (len(rows) - count) / count
                    line = f"{source}: {count} of {len(rows)} rows, about {left:.0f} s more"
                    print(line, flush=True)
                if isinstance(outcome, UserError):
                    self.refuse(outcome)
                    continue
                good += 1
                yield outcome
        if rows and not good:
            raise UserError(
                f"{source}: none of {len(rows)} rows can be read; the first one: {self.bad[0]}"
            )

    def use(self, *columns: str | None, hidden: bool = False) -> None:
        """Note that columns are read together; ``hidden``: without listing them."""
        names = [column for column in columns if column is not None]
        self.used |= dict.fromkeys(names)
        if names and not hidden:
            self.read[" + ".join(names)] = None

    def leave(self, columns: Iterable[str]) -> None:
        """Note columns that are not read, except those that are."""
        self.unused |= dict.fromkeys(c for c in columns if c not in self.used)

    def notes(self) -> tuple[str, ...]:
        """Lines about the columns, for the place where the first example is shown."""
        lines = []
        if self.read:
            lines.append(f"columns read: {', '.join(self.read)}")
        if self.unused:
            lines.append(f"columns not used: {', '.join(self.unused)}")
        if self.keys:
            lines.append(
                f"keys of messages that only the chat template may read: {', '.join(self.keys)}"
            )
        return (*lines, *self.remarks)

    def state(self) -> dict[str, Any]:
        """Options and findings, as JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        kinds: dict[type, Callable[[Any], Any]] = {set: sorted, dict: list}
        return {name: kinds.get(type(v), lambda v: v)(v) for name, v in values.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set options and findings to those of ``state``."""
        kinds: dict[type, Callable[[Any], Any]] = {set: set, dict: dict.fromkeys}
        for name, value in state.items():
            made = kinds.get(type(getattr(self, name)), lambda value: value)(value)
            setattr(self, name, made)

    def warnings(self) -> tuple[str, ...]:
        """Lines about rows that are not trained on as they are."""
        lines = []
        if self.bad:
            first = " | ".join(self.bad[:NAMED])
            more = f" | and {len(self.bad) - NAMED} more" if len(self.bad) > NAMED else ""
            lines.append(
                f"{len(self.bad)} bad rows are left out (--{self.section}.bad-rows skip): "
                f"{first}{more}"
            )
        if self.long_texts:
            lines.append(
                f"{len(self.long_texts)} texts of more than {self.limit} tokens are cut or split "
                f"(--{self.section}.long-text)"
            )
        return tuple(lines)


def _outcome(read: Callable[[int, Row], Read], index: int, row: Row) -> Read | UserError:
    try:
        return read(index, row)
    except UserError as error:
        return error


@contextmanager
def _mapped(
    read: Callable[[int, Row], Read | UserError], rows: Sequence[Row]
) -> Iterator[Iterable[Read | UserError]]:
    """Results of all rows in order, computed in threads where there are many."""
    if len(rows) < MANY:
        yield map(read, range(len(rows)), rows)
        return
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "rows")
    try:
        yield pool.map(read, range(len(rows)), rows)
    finally:
        pool.shutdown(cancel_futures=True)
