"""Find the longest text, and the longest completion, that fit a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from rlsloth.memory.activations import Stream
from rlsloth.memory.bisection import largest
from rlsloth.memory.modes import Mode, allowed_modes, embedding_places
from rlsloth.memory.settings import decide_settings
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.streamed import layer_counts
from rlsloth.memory.terms import Plan
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Placements

MOST = 1 << 24
"""Tokens of the longest text that is looked for."""

Planner = Callable[[ModelShape, Request], Plan]
"""Function that plans a request for a model."""


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


NONE = Longest(0, (), 0, 0)


def longest_completion(planner: Planner, shape: ModelShape, request: Request) -> Longest:
    """Find the longest completion with which the run fits, and a group is sampled at once.

    It is a ``rollout.max_tokens`` for which the plan decides settings that fit, with
    ``rollout.max_sequences`` at a group's completions, or at fewer where the request allows no
    more; a cache whose size the plan decides then holds all of them. A named
    ``tokens_per_microbatch`` grows to one completion with its prompt, which is never divided.

    Args:
        planner: function that plans a request for a model.
        shape: the model's sizes.
        request: the run, with the settings of its update as the user set them.
    """
    assert request.sampling is not None
    workload, rows = request.sampling.workload, request.sampling.group_at_once

    def longer(tokens: int) -> Request:
        return request.with_completions(tokens).with_sequences(rows)

    def alone(placements: Placements, tokens: int) -> Request:
        return longer(tokens).with_update(workload.longest_prompt + tokens, placements)

    def fits(planned: Plan) -> bool:
        return planned.fits and (planned.cache is None or planned.cache.holds >= rows)

    def decided(tokens: int) -> Request:
        run = longer(tokens)
        if request.tokens_per_microbatch is not None:
            least = max(request.tokens_per_microbatch, run.least_tokens(shape))
            run = replace(run, tokens_per_microbatch=least)
        return decide_settings(planner, shape, run)

    def reached(tokens: int) -> bool:
        return fits(planner(shape, decided(tokens)))

    most = workload.context_limit(shape) - workload.longest_prompt
    tokens = _longest(planner, shape, request, alone, fits, most).tokens
    # The decision may keep more of the GPU free. It may also have some layers' weights in host
    # memory, where that is too small for all and the GPU for none.
    if not (tokens and reached(tokens)):
        tokens = largest(reached, 1, tokens - 1 if tokens else most) or 0
    if not tokens:
        return NONE
    best = decided(tokens)
    placed, host = best.placed(len(shape.layers)), planner(shape, best).host
    return Longest(tokens, placed, best.streamed, host, limited=tokens == most)


def longest_text(planner: Planner, shape: ModelShape, request: Request) -> Longest:
    """Find the longest text, packed alone, whose update fits, over all allowed placements.

    Args:
        planner: function that plans a request for a model.
        shape: the model's sizes.
        request: the run, with ``model.gradient_checkpointing`` as the user set it.
    """

    def alone(placements: Placements, tokens: int) -> Request:
        one = replace(request, stream=Stream(0, tokens, 1))
        return one.with_update(tokens, placements)

    most = min(MOST, request.model.max_context or shape.context)
    found = _longest(planner, shape, request, alone, lambda planned: planned.fits, most)
    return replace(found, limited=found.tokens == most)


def _longest(
    planner: Planner,
    shape: ModelShape,
    request: Request,
    run: Callable[[Placements, int], Request],
    fits: Callable[[Plan], bool],
    most: int,
) -> Longest:
    """Find the placement with which the most tokens fit; ``run`` makes a run of so many."""
    plan, layers, found = partial(planner, shape), len(shape.layers), NONE
    offloads, counts = embedding_places(shape, request), layer_counts(shape, request)
    allowed = allowed_modes(shape, request)
    # Between none and all layers' weights in host memory little more would be found.
    for offload, streamed, mode in product(offloads, sorted({counts[0], counts[-1]}), allowed):

        def fitted(
            tokens: int, offload: bool = offload, streamed: int = streamed, mode: Mode = mode
        ) -> Request | None:
            def candidate(last: int) -> Request:
                made = run(mode.placements(layers, last), tokens)
                return made.with_embeddings(offload).with_layers(streamed)

            made = fitting(plan, candidate, mode.most(layers))
            return made if made is not None and fits(plan(made)) else None

        tokens = largest(lambda n: fitted(n) is not None, found.tokens + 1, most)
        if tokens and (best := fitted(tokens)) is not None:
            found = Longest(tokens, best.placed(layers), streamed, plan(best).host)
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
