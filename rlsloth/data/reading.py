"""The reading of a dataset: rows that are left out, and the use that each column finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from rlsloth.config import DatasetConfig
from rlsloth.data.rows import BadRows, Row
from rlsloth.errors import UserError

NAMED = 3
"""Number of bad rows that are named; the others are only counted."""
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
    long_texts: int = 0
    """Number of plain texts that were cut or split."""

    @classmethod
    def of(cls, cfg: DatasetConfig, limit: int | None = None) -> Reading:
        """Begin a reading with the options of a section."""
        return cls(cfg.SECTION, skip=cfg.bad_rows == "skip", limit=limit)

    def each(
        self, rows: Iterable[Row], source: str, read: Callable[[int, Row], Read]
    ) -> Iterator[Read]:
        """Read row after row, given its number from 0; leave bad ones out if that is wanted.

        Raises:
            UserError: a row is bad and bad rows are not left out, or no row is left.
        """
        count = good = 0
        for count, row in enumerate(rows, 1):
            try:
                found = read(count - 1, row)
            except UserError as error:
                self.refuse(error)
                continue
            good += 1
            yield found
        if count and not good:
            raise UserError(
                f"{source}: none of {count} rows can be read; the first one: {self.bad[0]}"
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
                f"{self.long_texts} texts of more than {self.limit} tokens are cut or split "
                f"(--{self.section}.long-text)"
            )
        return tuple(lines)
