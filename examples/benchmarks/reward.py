"""A reward that says nothing: for timing, where all that matters is that no advantage is zero."""

from __future__ import annotations

import zlib
from typing import Any


def checksum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """From 0 to 1, fixed by the tokens; equal for two completions only if they are the same."""
    return [zlib.crc32(repr(list(ids)).encode()) / 2**32 for ids in completion_ids]
