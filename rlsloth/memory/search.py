"""Find the largest settings and the longest texts that fit a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from rlsloth.memory.activations import Stream
from rlsloth.memory.bisection import largest
from rlsloth.memory.modes import Mode, embedding_places, modes
from rlsloth.memory.plan import precision_of
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.streamed import layer_counts
from rlsloth.memory.terms import Plan, element_size
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Placements

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


@dataclass(frozen=True, slots=True)
class Longest:
    """The longest text, or the longest completion, that fits."""

    tokens: int
    """Number of tokens; 0: none fits."""
    placements: Placements
    """Placement of the layers' activations with which it fits."""
    streamed: int
    """Number of layers whose weights are then in host memory."""
    host: int
    """Bytes of host memory that it takes."""
    limited: bool = False
    """Whether memory has room for more than the context holds."""


def longest_text(plan: Planner, shape: ModelShape, request: Request) -> Longest:
    """Find the longest text, packed alone, whose update fits, over all allowed placements.

    Args:
        plan: function that plans a request.
        shape: the model's sizes.
        request: the run, with ``model.gradient_checkpointing`` as the user set it.
    """

    def alone(placements: Placements, tokens: int) -> Request:
        one = replace(request, stream=Stream(0, tokens, 1))
        return one.with_update(tokens, placements)

    return _longest(plan, shape, request, alone, lambda planned, _: planned.fits, 1 << 24)


def longest_completion(plan: Planner, shape: ModelShape, request: Request) -> Longest:
    """Find the longest completion with which rollouts and update fit.

    Prompts and groups are as configured; one group is sampled at once, or as much of it as
    ``rollout.max_sequences`` allows, and a micro-batch holds one completion with its prompt.

    Args:
        plan: function that plans a request.
        shape: the model's sizes.
        request: the run, with ``model.gradient_checkpointing`` as the user set it.
    """
    assert request.sampling is not None
    workload, rows = request.sampling.workload, request.sampling.group_at_once

    def run(placements: Placements, tokens: int) -> Request:
        longer = request.with_completions(tokens).with_sequences(rows)
        return longer.with_update(workload.longest_prompt + tokens, placements)

    def fits(planned: Plan, candidate: Request) -> bool:
        return planned.fits and _holds_group(planned, shape, candidate, rows)

    most = workload.context_limit(shape) - workload.longest_prompt
    return _longest(plan, shape, request, run, fits, most)


def _holds_group(planned: Plan, shape: ModelShape, request: Request, rows: int) -> bool:
    """Tell whether a cache whose size the plan decides holds a group, which shares its prompt."""
    sampling = request.sampling
    assert sampling is not None
    size_of = sampling.engine.completion_bytes
    if planned.cache is None or size_of is None:
        return True
    tokens = sampling.workload.longest_prompt + rows * sampling.rollout.max_tokens
    size = element_size(precision_of(request.model, shape))
    return size_of(shape, sampling.rollout.kv_cache, tokens, size) <= planned.cache.size


def _longest(
    plan: Planner,
    shape: ModelShape,
    request: Request,
    run: Callable[[Placements, int], Request],
    fits: Callable[[Plan, Request], bool],
    most: int,
) -> Longest:
    """Find the placement with which the most tokens fit; ``run`` makes a run of so many."""
    layers, found = len(shape.layers), Longest(0, (), 0, 0)
    allowed = modes(request.model.gradient_checkpointing, shape.attention)
    offloads, counts = embedding_places(shape, request), layer_counts(shape, request)
    # Between none and all layers' weights in host memory little more would be found.
    for offload, streamed, mode in product(offloads, sorted({counts[0], counts[-1]}), allowed):

        def fitted(
            tokens: int, offload: bool = offload, streamed: int = streamed, mode: Mode = mode
        ) -> Request | None:
            def candidate(last: int) -> Request:
                made = run(mode.placements(layers, last), tokens)
                return made.with_embeddings(offload).with_layers(streamed)

            made = fitting(plan, candidate, mode.most(layers))
            return made if made is not None and fits(plan(made), made) else None

        tokens = largest(lambda n: fitted(n) is not None, found.tokens + 1, most)
        if tokens and (best := fitted(tokens)) is not None:
            placed, host = best.placed(layers), plan(best).host
            found = Longest(tokens, placed, streamed, host, limited=tokens == most)
    return found


def fitting(
    plan: Callable[[Request], Plan], candidate: Callable[[int], Request], most: int
) -> Request | None:
    """Give as many of the last layers as fit the GPU a mode's second placement.

    Args:
        plan: function that plans a request.
        candidate: makes the request with so many layers of the second placement.
        most: largest number of such layers.

    Returns:
        The request; None if the GPU has no room for any number of layers, or the host none for the
        largest one that fits the GPU.
    """

    def fits(last: int) -> bool:
        made = plan(candidate(last))
        return made.peak("update") <= made.total

    last = largest(fits, 0, most)
    if last is None:
        return None
    # The second placement needs no more of the host than the first.
    return candidate(last) if plan(candidate(last)).fits_host else None


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
    engine. For an engine with a cache whose size the plan decides it is also at most OVERCOMMIT for
    each completion that the cache holds; for another one, whose cache stays during the update,
    rollouts take at most half of the memory that one row leaves, and the update still fits.

    Args:
        plan: function that plans a request.
        shape: the model's sizes.
        request: the run; if its placements are open, the update that needs the least memory is
            assumed.
    """
    sampling = request.sampling
    if sampling is None or sampling.rollout.max_sequences != "auto":
        return request
    assumed = request
    if request.placements is None:
        mode = modes(request.model.gradient_checkpointing, shape.attention)[-1]
        tokens = request.tokens_per_microbatch or request.least_tokens(shape)
        assumed = request.with_update(tokens, mode.placements(len(shape.layers), 0))
        assumed = assumed.with_embeddings(embedding_places(shape, request)[-1])
    for count in layer_counts(shape, request):
        assumed = assumed.with_layers(count)
        one = plan(assumed.with_sequences(1))
        if one.left >= 0:
            break
    half = (one.peak("rollout") + one.total) / 2

    def fits(rows: int) -> bool:
        planned = plan(assumed.with_sequences(rows))
        if planned.cache is not None:
            return planned.cache.holds * OVERCOMMIT >= rows
        return planned.left >= 0 and planned.peak("rollout") <= half

    return request.with_sequences(largest(fits, 1, sampling.at_once) or 1)
