"""A soft limit on the number of tokens."""

from __future__ import annotations

from rlsloth.errors import UserError
from rlsloth.scoring.example import Example


def length(
    completion_ids: list[list[int]], *, target: int = 256, tolerance: int = 256
) -> list[float | None]:
    """1 up to ``target`` tokens, then falling linearly to 0 at ``target + tolerance``.

    With L tokens, tool output included: min(1, max(0, 1 - (L - target) / tolerance)). The shape is
    that of DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), moved up by one.

    Args:
        target: Tokens that cost nothing.
        tolerance: Tokens beyond the target at which nothing is left.
    """
    if target < 0 or tolerance < 1:
        raise UserError("reward.params.length: target must be at least 0 and tolerance at least 1")
    return [min(1.0, max(0.0, 1 - (len(ids) - target) / tolerance)) for ids in completion_ids]


EXAMPLES = (
    Example("short", 1.0, "below the target", completion_ids=tuple(range(100))),
    Example("at the target", 1.0, "at the target", completion_ids=tuple(range(256))),
    Example("longer", 0.5, "half the tolerance used", completion_ids=tuple(range(384))),
    Example("far too long", 0.0, "beyond the tolerance", completion_ids=tuple(range(600))),
)
