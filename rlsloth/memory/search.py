"""Find the largest settings that fit a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from rlsloth.memory.activations import Stream
from rlsloth.memory.placing import modes
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import Plan
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Placements


@dataclass(frozen=True, slots=True)
class LongestText:
    """The longest single text whose update fits."""

    tokens: int
    """Number of tokens; 0: none fits."""
    placements: Placements
    """Placement of the layers' activations with which it fits."""
    host: int
    """Bytes of host memory that it takes."""


def longest_text(
    plan: Callable[[Request], Plan], shape: ModelShape, request: Request
) -> LongestText:
    """Find the longest text, packed alone, whose update fits, over all allowed placements.

    Args:
        plan: function that plans a request.
        shape: the model's sizes.
        request: the run, with ``model.gradient_checkpointing`` as the user set it.
    """
    layers, found = len(shape.layers), LongestText(0, (), 0)
    for mode in modes(request.model.gradient_checkpointing, shape.attention):
        placements = mode.placements(layers, 0)
        placed = partial(_alone, plan, request, placements)
        most = _largest(placed, 1, 1 << 24)
        if most > found.tokens:
            found = LongestText(most, placements, placed(most).host)
    return found


def _alone(
    plan: Callable[[Request], Plan], request: Request, placements: Placements, tokens: int
) -> Plan:
    """Plan an update on one text."""
    return plan(replace(request, stream=Stream(0, tokens, 1)).with_update(tokens, placements))


def largest_tokens(plan: Callable[[Request], Plan], request: Request, least: int) -> int:
    """Find the largest ``tokens_per_microbatch`` that fits; 0 if ``least`` tokens do not fit."""
    return _largest(lambda n: plan(replace(request, tokens_per_microbatch=n)), least)


def largest_sequences(plan: Callable[[Request], Plan], request: Request) -> int:
    """Find the largest ``rollout.max_sequences`` that fits; 0 if not even 1 does.

    It is at most the number of completions of a step or an evaluation.
    """
    assert request.sampling is not None
    most = request.sampling.workload.sequences
    return min(_largest(lambda rows: plan(request.with_sequences(rows)), 1), most)


def _largest(plan: Callable[[int], Plan], least: int, most: int = 1 << 20) -> int:
    """Find the largest number between ``least`` and ``most`` that fits, 0 if none, by bisection."""
    if not plan(least).fits:
        return 0
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan(middle).fits else (low, middle - 1)
    return low
