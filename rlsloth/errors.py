"""UserError for faults that the user can fix, and texts that error messages share."""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable

DETAIL_LIMIT = 300
LINE_LIMIT = 200


class UserError(Exception):
    """A fault that the user can fix. The text says what is wrong, where, and what to do.

    The command line prints it in one line and exits with status 2.
    """


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
