"""Memory of the update: rows of a plan for activations, by the placement of each layer."""

from __future__ import annotations

from collections import Counter

import torch

from rlsloth.kernels.linear_logprob.op import most_rows
from rlsloth.kernels.lora.layer import ALIGNMENT
from rlsloth.memory.activations import LayerMemory, attention_results, layer_memory
from rlsloth.memory.shape import Layer, ModelShape, layer_kinds
from rlsloth.memory.terms import Precision, Term, element_size
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Place, Placement, Placements

PlacedKind = tuple[Layer, Placement | None, int]
"""A layer, its placement, and the number of layers that are alike in both."""


def placed_kinds(shape: ModelShape, placements: Placements) -> list[PlacedKind]:
    """Count the layers that are alike in their sizes and in their placement."""
    kinds, places = layer_kinds(shape)
    different = {id(placement): placement for placement in placements}
    if len(kinds) == 1:
        numbers = Counter(map(id, placements))
        return [(kinds[0], different[key], number) for key, number in numbers.items()]
    counts = Counter(zip(places, map(id, placements), strict=True))
    return [(kinds[kind], different[key], count) for (kind, key), count in counts.items()]


def update_terms(
    shape: ModelShape, request: Request, precision: Precision, placed: list[PlacedKind]
) -> list[Term]:
    """List the memory of activations, and that of the loss.

    Args:
        shape: the model's sizes.
        request: the run.
        precision: precision of the base model.
        placed: the layers with their placements.
    """
    size, tokens = element_size(precision), request.microbatch
    stream = request.micro_batch_stream()
    again: list[LayerMemory] = []
    kept: list[tuple[LayerMemory, int]] = []
    inputs = 0
    for layer, placement, count in placed:
        rows = None if placement is None or placement.mlp_rows is None else tokens
        memory = layer_memory(layer, shape.hidden, size, stream, shape.attention, placement, rows)
        if placement is None:
            kept.append((memory, count))
        else:
            again.append(memory)
        inputs += count * held_bytes(layer, shape.hidden, size, placement, "device")
    head = head_bytes(shape, tokens, precision)
    terms = [Term("activations: layer inputs (estimate)", 0, tokens * inputs)]
    if passing := _passing(shape, size, placed):
        terms.append(Term("activations: between GPU and host (estimate)", 0, tokens * passing))
    whole = int(tokens * sum(count * m.kept for m, count in kept))
    if kept:
        number = sum(count for _, count in kept)
        # The kernels' padded copies of adapters (kernels/lora: autograd.Adapters, mlp.Parts).
        rank = request.lora.rank
        padded = (rank + -rank % ALIGNMENT) / rank * number / len(shape.layers)
        adapted = shape.layers[0].on_kernels and not shape.whole
        whole += int(size * sum(shape.trained) * padded) if adapted else 0
        work = max(m.at_work(tokens) - tokens * m.kept for m, _ in kept)
        work += size * shape.layer_trained  # gradients before they are added to the others
        work += _waiting(shape, size)
        name = f"activations: layers kept ({number}), and one's backward (estimate)"
        terms.append(Term(name, 0, whole + int(work), moment=True))
    if again:  # the layers kept are the last ones, whose memory is free by then
        work = max(m.at_work(tokens) for m in again)
        tiled = any(p is not None and p.mlp_rows is not None for _, p, _ in placed)
        # Tiles add up their weights' gradients in float32 (kernels/lora/mlp_tiles.py).
        work += (2 * 4 if tiled else size) * shape.layer_trained + _waiting(shape, size)
        name = "activations: one layer's forward and backward (estimate)"
        terms.append(Term(name, 0, int(work), moment=True))
    with_kept = " with the layers kept" if kept else ""
    return [*terms, Term(f"linear_logprob{with_kept}", 0, whole + head, moment=True)]


def _waiting(shape: ModelShape, size: int) -> int:
    """Return the bytes of a tied head's gradient, which waits for the embedding's."""
    tied = not any(weight.group == "head" for weight in shape.weights)
    return size * shape.vocabulary * shape.hidden if shape.head_trained and tied else 0


def held_bytes(
    layer: Layer, hidden: int, size: int, placement: Placement | None, place: Place
) -> int:
    """Return the bytes a token that a layer holds in a place from its forward to its backward.

    For a layer that keeps all its activations this is its input only.
    """
    return sum(held_tensors(layer, hidden, size, placement, place))


def held_tensors(
    layer: Layer, hidden: int, size: int, placement: Placement | None, place: Place
) -> list[int]:
    """List the bytes a token of each tensor that ``held_bytes`` counts."""
    if placement is None:
        return [hidden * size] if place == "device" else []
    held = [hidden * size] if placement.input == place else []
    if placement.attention == place:
        held += attention_results(layer, size)
    if placement.projections == place:
        held += [width * size for width in (layer.queries, layer.keys, layer.keys)]
    if placement.sum == place:
        held += [hidden * size]
    return held


def _passing(shape: ModelShape, size: int, placed: list[PlacedKind]) -> int:
    """Return the bytes a token of a layer's tensors being fetched, and of the input at work."""
    most = max(held_bytes(layer, shape.hidden, size, p, "host") for layer, p, _ in placed)
    return most + shape.hidden * size if most else 0


def head_bytes(shape: ModelShape, tokens: int, precision: Precision) -> int:
    """Estimate the bytes of linear_logprob and the hidden states before it, if all tokens count."""
    size, fused = element_size(precision), precision != "fp32"
    rows = min(tokens, most_rows(shape.vocabulary, torch.device("cuda"), fused))
    # The decoder's output and the scored copy, which the gradient overwrites.
    hidden = 2 * tokens * shape.hidden * size
    # A chunk has odds in the compute type, or float32 logits and odds; their product with the head
    # in float32; and the normed rows.
    chunk = rows * (shape.vocabulary * (size if fused else 8) + shape.hidden * (4 + size))
    if shape.head_trained:  # its gradient is added up in float32, then rounded (linear_logprob)
        hidden += (4 + size) * shape.vocabulary * shape.hidden
    if shape.head_rank:
        # An adapted head is copied together with its adapter, and so are the hidden states.
        copied = (shape.vocabulary + tokens) * (shape.hidden + shape.head_rank) * size
        hidden += copied + 4 * shape.vocabulary * shape.head_rank + tokens * shape.hidden * size
    return hidden + chunk
