"""Find the largest settings that fit a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rlsloth.memory.terms import Plan
from rlsloth.memory.workload import Request


def largest_tokens(plan: Callable[[Request], Plan], request: Request, least: int) -> int:
    """Find the largest ``tokens_per_microbatch`` that fits; 0 if ``least`` tokens do not fit."""
    return _largest(lambda n: plan(replace(request, tokens_per_microbatch=n)).fits, least)


def largest_sequences(plan: Callable[[Request], Plan], request: Request) -> int:
    """Find the largest ``rollout.max_sequences`` that fits; 0 if not even 1 does.

    It is at most the number of completions of a step or an evaluation.
    """
    assert request.sampling is not None
    most = request.sampling.workload.sequences
    return min(_largest(lambda rows: plan(request.with_sequences(rows)).fits, 1), most)


def _largest(fits: Callable[[int], bool], least: int, most: int = 1 << 20) -> int:
    """Find the largest number between ``least`` and ``most`` that fits, 0 if none, by bisection."""
    if not fits(least):
        return 0
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
