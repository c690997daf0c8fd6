"""Memory of layers whose weights wait in host memory (policy/streamed_layers.py)."""

from __future__ import annotations

from rlsloth.memory.shape import ModelShape, Weight
from rlsloth.memory.terms import Precision, element_size
from rlsloth.memory.workload import Request
from rlsloth.policy.streamed_layers import SLOTS

PARTS = 8
"""The plan tries so many numbers of layers in host memory, in equal steps up to all."""
COPY_S_PER_BYTE = 2e-11
"""Seconds to copy a byte to the GPU, at 50 GB/s (PCIe 5.0 with 16 lanes)."""


def layer_counts(shape: ModelShape, request: Request) -> tuple[int, ...]:
    """List the allowed values of ``model.offload_layers``, the fastest one first."""
    if request.model.offload_layers != "auto":
        return (request.model.offload_layers,)
    sampling = request.sampling
    if sampling is not None and (sampling.engine.shares_weights or sampling.rollout.overlap):
        return (0,)
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


def blocks(shape: ModelShape, request: Request, precision: Precision) -> list[int]:
    """Return the bytes in host memory of each layer whose weights are there."""
    sizes = [0] * request.streamed
    for weight in shape.weights:
        if weight.layer is not None and weight.layer < len(sizes):
            sizes[weight.layer] += streamed_bytes(weight, precision)
    return sizes


def slot_bytes(sizes: list[int]) -> int:
    """Return the bytes of the slots on the GPU for layers of these sizes."""
    return sum(max(sizes[first::SLOTS], default=0) for first in range(SLOTS))


def exposed_seconds(sizes: list[int], forward: float, backward: float) -> float:
    """Return the seconds of a micro-batch in which the GPU waits for copies.

    Args:
        sizes: bytes of each layer in host memory.
        forward: seconds of a layer's forward.
        backward: seconds of its backward, with a second forward if there is one.
    """
    copies = [size * COPY_S_PER_BYTE for size in sizes[SLOTS:]]  # the slots still hold two
    return sum(max(0.0, one - work) for one in copies for work in (forward, backward))
