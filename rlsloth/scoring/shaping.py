"""The overlong penalty: a reward's shaping by length, kept apart from the reward itself."""

from __future__ import annotations

from collections.abc import Sequence

from rlsloth.errors import UserError
from rlsloth.records import Group


def penalize_overlong(groups: Sequence[Group], *, max_tokens: int, buffer: int) -> None:
    """Fill ``overlong_penalty`` of every rollout; a buffer of 0 leaves it None.

    Raises:
        UserError: see ``overlong_penalty``.
    """
    if buffer == 0:
        return
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        rollout.overlong_penalty = overlong_penalty(rollout.length, max_tokens, buffer)


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft overlong punishment of a completion (arXiv:2503.14476, eq. 13).

    0 up to ``max_tokens - buffer`` tokens, then falling linearly to -1 at ``max_tokens``, and -1
    beyond. A buffer of 0 switches it off.

    Raises:
        UserError: the buffer is longer than the completions may be.
    """
    if buffer > max_tokens:
        raise UserError(
            f"loss.overlong_buffer ({buffer}) exceeds rollout.max_tokens ({max_tokens}), so every "
            "completion would be penalized: lower --loss.overlong-buffer"
        )
    if buffer == 0:
        return 0.0
    over = length - (max_tokens - buffer)
    return -min(max(over / buffer, 0.0), 1.0)
