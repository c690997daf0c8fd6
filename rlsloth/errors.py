"""Errors for faults that the user can fix, and texts that error messages share."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import shutil
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DETAIL_LIMIT = 300
LINE_LIMIT = 200
_WRITE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
"""Failures that a write, a flush or a sync has without naming a file."""
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the direction of text: they can make a line read as another one."""


class UserError(Exception):
    """A fault that the user can fix. The text says what is wrong, where, and what to do.

    The command line prints it in one line and exits with status 2.
    """


class WriteError(OSError):
    """A file or folder could not be written; the text names it, its bytes and the reason."""

    def __init__(self, number: int, path: Path, size: int) -> None:
        reason = f"{os.strerror(number)} (writing {size:,} bytes{_free(number, path)})"
        super().__init__(number, reason, str(path))

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def _free(number: int, path: Path) -> str:
    if number == errno.ENOSPC:
        with contextlib.suppress(OSError):
            return f", {shutil.disk_usage(path.parent).free:,} are free"
    return ""


@contextmanager
def naming_writes(path: Path, size: Callable[[], int], *places: Path) -> Iterator[None]:
    """Raise a failed write of the body as a WriteError.

    Args:
        path: the file or folder to name.
        size: counts its bytes.
        places: other paths under which the body writes it; an error about any other file stays.

    Raises:
        WriteError: the file system refuses.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None or not _is_about(error, number, (path, *places)):
            raise
        raise WriteError(number, path, size()) from error


def _is_about(error: Exception, number: int, paths: Sequence[Path]) -> bool:
    """Whether an error is about writing to one of the paths, or in the folder of the first."""
    named = getattr(error, "filename", None)
    if named is None:
        return number in _WRITE_FAULTS
    file = Path(str(named))
    return file == paths[0].parent or any(file.is_relative_to(path) for path in paths)


def _error_number(error: Exception) -> int | None:
    """The operating system's number of a failure; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found and type(error).__name__ == "SafetensorError" else None


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException, limit: int = LINE_LIMIT) -> str:
    """The first line of an exception's text, cut to ``limit`` characters; without text its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def describe_exception(error: BaseException) -> str:
    """One line about an exception of foreign code: ``ValueError: no digits (mine.py:12)``."""
    frames = traceback.extract_tb(error.__traceback__)
    own = frames and not frames[-1].filename.startswith("<")  # <frozen importlib...>
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if own else ""
    words = " ".join([f"{type(error).__name__}:", *str(error).split()])
    return words[:DETAIL_LIMIT].removesuffix(":") + place


def visible(text: str) -> str:
    r"""Text that is safe on a terminal and in a log: control characters become escapes (``\x1b``).

    Sampled text, rewards and servers must not move the cursor, change colours or rewrite lines.
    Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_safe(c) else c.encode("unicode_escape").decode() for c in text)


def _is_safe(character: str) -> bool:
    if character.isprintable() or character in "\n\t":
        return True
    kind = unicodedata.category(character)
    return kind not in ("Cc", "Cs", "Zl", "Zp") and character not in _DIRECTIONS
