"""Decide the settings of a run that depend on memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rlsloth.memory.placing import choose
from rlsloth.memory.search import decide_sequences
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import Plan
from rlsloth.memory.workload import Request


def decide_settings(
    planner: Callable[[ModelShape, Request], Plan], shape: ModelShape, request: Request
) -> Request:
    """Decide the settings that a request leaves open.

    Args:
        planner: function that plans a request for a model.
        shape: the model's sizes.
        request: the run as the user set it.
    """
    plan_of = partial(planner, shape)
    if request.sampling is not None and request.sampling.engine.shares_weights:
        request = request.with_shared_weights()
    # The fallback engine may end up sampling, and the embedded engine keeps its cache during the
    # update, so its memory must fit.
    sampled = decide_sequences(plan_of, shape, request.with_fallback())
    update = choose(plan_of, shape, sampled, request.least_tokens(shape))
    if request.sampling is None or (request.sampling.fallback is None and not update.streamed):
        return update
    # The engine that is to sample, with the room that the update's decisions leave: layers in host
    # memory, of which there may be more than the first decision took, make room for sequences.
    request = request.with_embeddings(update.model.offload_embeddings is True)
    request = request.with_layers(update.streamed)
    decided = request.with_update(update.microbatch, update.placed(len(shape.layers)))
    return decide_sequences(plan_of, shape, decided)
