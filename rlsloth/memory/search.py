"""Find the largest settings that fit a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

from rlsloth.config import MICROBATCH
from rlsloth.memory.bisection import largest
from rlsloth.memory.modes import allowed_modes, embedding_places
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.streamed import layer_counts
from rlsloth.memory.terms import Plan
from rlsloth.memory.workload import Request

LONGEST_TO_MEAN = 3
"""Assumed ratio of the longest completion's tokens to the mean of all: most end long before their
limit."""
OVERCOMMIT = int(math.e * LONGEST_TO_MEAN)
"""Completions that vLLM is started for, for each that its cache holds at full length.

Completions are started together. If their lengths are distributed exponentially with mean m, a
share exp(-t / m) of them is still running after t tokens, each with t tokens in the cache: for each
completion that was started these are t * exp(-t / m), at most m / e (at t = m). With the limit at
LONGEST_TO_MEAN * m the cache then has room for e * LONGEST_TO_MEAN for each of full length. If it
runs full nevertheless, the last ones wait and are prefilled again, which takes little next to
decoding. A row that stays empty takes about 2 % of a completion's memory.
"""

Planner = Callable[[Request], Plan]
"""Function that plans a request."""


def largest_tokens(plan: Planner, request: Request, least: int) -> int:
    """Find the largest ``tokens_per_microbatch`` that fits; 0 if ``least`` tokens do not fit."""
    return largest(lambda n: plan(replace(request, tokens_per_microbatch=n)).fits, least) or 0


def largest_sequences(plan: Planner, request: Request) -> int:
    """Find the largest ``rollout.max_sequences`` that fits; 0 if not even 1 does.

    It is at most the number of completions of a step or an evaluation.
    """
    assert request.sampling is not None
    most = request.sampling.workload.sequences
    return largest(lambda rows: plan(request.with_sequences(rows)).fits, 1, most) or 0


def decide_sequences(plan: Planner, shape: ModelShape, request: Request) -> Request:
    """Copy a request with ``rollout.max_sequences`` decided if it is ``auto``.

    It is the number of completions of a step or an evaluation, at most ``most_sequences`` of the
    engine, and the update still fits. For an engine with a cache whose size the plan decides it is
    also at most OVERCOMMIT for each completion that the cache holds, and no more than leave room
    for a group, if fewer do; for another one, whose cache stays during the update, rollouts take at
    most half of the memory that one row leaves, without what they need for a moment only.

    Args:
        plan: function that plans a request.
        shape: the model's sizes.
        request: the run; if its placements are open, the update that needs the least memory is
            assumed.
    """
    sampling = request.sampling
    if sampling is None or sampling.rollout.max_sequences != "auto":
        return request
    for assumed in _updates(shape, request):
        one = plan(assumed.with_sequences(1))
        if one.left >= 0:
            break
    half = (_lasting(one) + one.total) / 2
    alone = plan(assumed.with_sequences(sampling.group_at_once)).cache
    group = 0 if alone is None else alone.holds

    def fits(rows: int) -> bool:
        planned = plan(assumed.with_sequences(rows))
        if planned.left < 0:
            return False
        if planned.cache is not None:
            held = planned.cache.holds
            return held * OVERCOMMIT >= rows and held >= min(rows, group)
        return _lasting(planned) <= half

    return request.with_sequences(largest(fits, 1, sampling.at_once) or 1)


def _lasting(plan: Plan) -> int:
    """Return the bytes of rollouts without those that are needed for a moment, such as prefills."""
    return sum(term.rollout for term in plan.terms if not term.moment)


def _updates(shape: ModelShape, request: Request) -> Iterator[Request]:
    """Yield runs with the update that may be decided later, those that need the most memory first.

    If placements are open, it is the update that needs the least memory; beside sampling its
    micro-batches have MICROBATCH tokens if they fit (placing.choose).
    """
    assumed, sizes = request, [request.tokens_per_microbatch or request.least_tokens(shape)]
    if request.overlap and request.tokens_per_microbatch is None:
        sizes = [max(MICROBATCH, *sizes), *sizes]
    for count, tokens in product(layer_counts(shape, request), sizes):
        if request.placements is None:
            mode = allowed_modes(shape, request)[-1]
            assumed = request.with_update(tokens, mode.placements(len(shape.layers), 0))
            assumed = assumed.with_embeddings(embedding_places(shape, request)[-1])
        yield assumed.with_layers(count)
