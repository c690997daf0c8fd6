"""The console of a run, which may go away: a closed terminal, a pipe without a reader, a full disk.

None of them ends a run: its files go on. The command line asks `reader_lost` for its exit status.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from typing import TextIO, cast

from rich.console import Console

_lost_readers: set[int] = set()


class SteadyFile(io.TextIOBase):
    """A text file whose failed writes are dropped."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write, or drop the text if the file is gone."""
        with dropping_output():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing if the file is gone."""
        with dropping_output():
            self._file.flush()

    def isatty(self) -> bool:
        """Whether the file is a terminal."""
        return self._file.isatty()

    def fileno(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The file's encoding."""
        return self._file.encoding or "utf-8"


@contextlib.contextmanager
def dropping_output() -> Iterator[None]:
    """Ignore failures to write to stdout or stderr, and turn streams that are gone off."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: the file is closed
        for stream in (sys.__stdout__, sys.__stderr__):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                assert stream is not None
                _turn_off(stream.fileno())


def _turn_off(descriptor: int) -> None:
    """Point a descriptor without a terminal or a reader at the null device."""
    poll = select.poll()
    poll.register(descriptor, 0)
    events = [event for _, event in poll.poll(0)]
    if not any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for event in events):
        return
    if not stat.S_ISCHR(os.fstat(descriptor).st_mode):  # a pipe, and no terminal
        _lost_readers.add(descriptor)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def reader_lost() -> bool:
    """Whether stdout was a pipe whose reader has gone (``| head``)."""
    return 1 in _lost_readers


def tell(text: str, *, error: bool = False) -> None:
    """Print a line on stdout, or on stderr, if it is still there."""
    with dropping_output():
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


def open_console() -> Console:
    """Open the console on stdout; in a notebook it writes plain lines.

    There rich would print each line as a block of HTML, or, where FORCE_COLOR is set (Jupyter sets
    it for its kernels), move the cursor of a terminal that is none.
    """
    file = cast(TextIO, SteadyFile(sys.stdout))
    console = Console(file=file, highlight=False, soft_wrap=True)
    if console.is_jupyter:
        return Console(
            file=file, highlight=False, soft_wrap=True, force_jupyter=False, force_terminal=False
        )
    return console
