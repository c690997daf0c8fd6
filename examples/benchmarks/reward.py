"""A meaningless reward for timing, which only has to make every advantage differ from zero."""

from __future__ import annotations

import zlib
from typing import Any


def checksum(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A number from 0 to 1 computed from the tokens; it differs for different completions."""
    return [zlib.crc32(repr(list(ids)).encode()) / 2**32 for ids in completion_ids]
