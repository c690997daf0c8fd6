"""Memory of layers whose weights wait in host memory (policy/streamed_layers.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from rlsloth.memory.shape import ModelShape, Weight, remembered
from rlsloth.memory.terms import Precision, element_size
from rlsloth.memory.workload import Request
from rlsloth.policy.streamed_layers import SLOTS

PARTS = 8
"""The plan tries so many numbers of layers in host memory, in equal steps up to all."""


def layer_counts(shape: ModelShape, request: Request) -> tuple[int, ...]:
    """List the allowed values of ``model.offload_layers``, the fastest one first."""
    if request.model.offload_layers != "auto":
        return (request.model.offload_layers,)
    return eighths(shape) if may_stream(request) and not shape.whole else (0,)


def may_stream(request: Request) -> bool:
    """Tell whether a run can have layers' weights in host memory.

    vLLM computes with the trainer's weights, and sampling during the update would fetch layers
    against it.
    """
    sampling = request.sampling
    return sampling is None or not (sampling.engine.shares_weights or sampling.rollout.overlap)


def eighths(shape: ModelShape) -> tuple[int, ...]:
    """List numbers of layers in equal steps, from none to all."""
    layers = len(shape.layers)
    return tuple(sorted({-(-layers * part // PARTS) for part in range(PARTS + 1)}))


def streamed_bytes(weight: Weight, precision: Precision) -> int:
    """Return the bytes of a weight that are in host memory if its layer's weights are.

    In NF4 these are the codes and their 8-bit scales; the scales of the scales stay on the GPU.
    """
    if weight.layer is None or weight.group not in ("linears", "experts"):
        return 0
    if precision == "nf4" and weight.quantised:
        return -(-weight.count // 2) + -(-weight.count // 64)
    return weight.count * element_size(precision)


@remembered
def blocks(shape: ModelShape, precision: Precision, count: int) -> tuple[int, ...]:
    """Return the bytes in host memory of each of the first ``count`` layers."""
    sizes = [0] * count
    for weight in shape.weights:
        if weight.layer is not None and weight.layer < count:
            sizes[weight.layer] += streamed_bytes(weight, precision)
    return tuple(sizes)


def slot_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes of the slots on the GPU for layers of these sizes."""
    return sum(max(sizes[first::SLOTS], default=0) for first in range(SLOTS))


def exposed_seconds(sizes: Sequence[int], forward: float, backward: float, bus: float) -> float:
    """Return the seconds of a micro-batch in which the GPU waits for copies.

    Args:
        sizes: bytes of each layer in host memory.
        forward: seconds of a layer's forward.
        backward: seconds of its backward, with a second forward if there is one.
        bus: bytes that are copied in a second.
    """
    copies = _counted(tuple(sizes[SLOTS:]))  # the slots still hold two
    return sum(
        count * (max(0.0, size / bus - forward) + max(0.0, size / bus - backward))
        for size, count in copies.items()
    )


@lru_cache
def _counted(sizes: tuple[int, ...]) -> Counter[int]:
    return Counter(sizes)
