"""The memory plan of a run on one GPU: sizes of tensors by phase, computed before loading.

Weights, adapters, optimizer states and the embedded engine's cache are counted exactly. Activations
are an estimate (activations.py), within ACTIVATION_TOLERANCE of the measured peak on a CPU.

vLLM's key-value cache gets the room that everything else leaves. It is the only memory that is
freed for the update and allocated again for rollouts.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rlsloth.config import ModelConfig
from rlsloth.kernels.linear_logprob.op import most_rows
from rlsloth.kernels.lora.layer import ALIGNMENT
from rlsloth.kernels.nf4.ahead import BUFFERS
from rlsloth.memory.activations import LayerMemory, attention_results, layer_memory
from rlsloth.memory.shape import Layer, ModelShape, Weight
from rlsloth.memory.streamed import blocks, slot_bytes, streamed_bytes
from rlsloth.memory.terms import Cache, Phase, Plan, Precision, Term, element_size
from rlsloth.memory.workload import EngineMemory, Request, Sampling
from rlsloth.policy.activations.placement import Place, Placement, Placements
from rlsloth.policy.gpu_limit import CONTEXT
from rlsloth.policy.streamed_layers import SLOTS

ACTIVATION_TOLERANCE = 0.12
"""Relative error of the estimate on a CPU, for nine families (tests/memory/test_plan.py)."""
KEPT_FREE = 0.1
"""Share of a GPU that the decision leaves free for errors of the estimate and fragmentation."""
SPARE = 32
"""1 / SPARE of a GPU is not given to the cache, because allocators lose memory to gaps."""
SMALL_CACHE = 20
"""A cache of at most 1 / SMALL_CACHE of a GPU is kept during the update if both fit.

Freeing and allocating a cache takes 30 ms a step, and empties torch's own cache of blocks.
"""


def make_plan(
    shape: ModelShape,
    request: Request,
    total: int,
    *,
    engine: EngineMemory | None = None,
    context: int | None = None,
    free: int | None = None,
    host_total: int | None = None,
) -> Plan:
    """Plan the memory of a run.

    Args:
        shape: the model's sizes.
        request: the run.
        total: bytes of the GPU.
        engine: the engine that samples; the request's by default.
        context: number of tokens of the longest prompt with its completion; the workload's by
            default.
        free: bytes that are free on the GPU once the model is loaded; as planned by default.
        host_total: bytes of host memory that may be used for activations; None if unknown.
    """
    precision, sampling = precision_of(request.model, shape), request.decoding
    terms = _static(shape, request, precision)
    if sampling is not None:
        engine = engine or sampling.engine
        context = context or sampling.workload.longest_sequence(shape)
        terms += engine.terms(shape, sampling, precision, context)
    terms += _activations(shape, request, precision)
    terms.append(Term("CUDA context, kernels (allowance)", CONTEXT, CONTEXT, loaded=True))
    host = host_bytes(shape, request)
    if sampling is None or engine is None or context is None:
        return Plan(None, tuple(terms), total, host=host, host_total=host_total)
    if engine.completion_bytes is None:
        return Plan(engine.name, tuple(terms), total, host=host, host_total=host_total)
    # The cache may take all remaining room except this.
    spare = total // SPARE
    name = f"{engine.title}: allocators' gaps (allowance)"
    terms.append(Term(name, spare, spare if request.overlap else 0))
    plan = Plan(engine.name, tuple(terms), total, host=host, host_total=host_total)
    kind, size = sampling.rollout.kv_cache, element_size(precision)
    one = engine.completion_bytes(shape, kind, context, size)
    return _with_cache(plan, engine.title, one, sampling, context, free)


def precision_of(model: ModelConfig, shape: ModelShape) -> Precision:
    """Return the precision of the base model's weights on a GPU."""
    if shape.stored_in_nf4:
        return "nf4"
    return "bf16" if model.precision == "auto" else model.precision


def _with_cache(
    plan: Plan, title: str, one: int, sampling: Sampling, context: int, free: int | None
) -> Plan:
    """Add the engine's cache to a plan, in the room that other terms leave.

    A small cache is kept in both phases, a larger one only for rollouts, unless they overlap with
    the update.
    """
    overlap = sampling.rollout.overlap
    phases: tuple[Phase, ...] = ("rollout", "update") if overlap else ("rollout",)
    room = min(plan.total - plan.peak(phase) for phase in phases)
    if free is not None:
        room = min(room, *(free - plan.peak(phase, to_come=True) for phase in phases))
    cache = fit_cache(one, sampling.at_once, context, room)
    left = plan.total - plan.peak("update")
    if free is not None:
        left = min(left, free - plan.peak("update", to_come=True))
    fits_both = cache.size + KEPT_FREE * plan.total <= left
    stays = overlap or (fits_both and SMALL_CACHE * cache.size <= plan.total)
    name = f"{title}: key-value cache, {max(1, cache.holds)} x {context}"
    term = Term(name, cache.size, cache.size if stays else 0)
    return replace(plan, terms=(*plan.terms, term), cache=replace(cache, stays=stays))


def fit_cache(one: int, asked: int, context: int, room: int) -> Cache:
    """Size a key-value cache.

    Completions that do not fit wait, or are started again if the cache runs out of room.

    Args:
        one: bytes of one completion.
        asked: number of completions to decode at once.
        context: number of tokens of the longest prompt with its completion.
        room: bytes that are available.
    """
    if room < one:
        return Cache(one, asked, 0, context)
    size = min(asked * one, room)
    return Cache(size, asked, size // one, context)


# --- both phases ---------------------------------------------------------------------------------


def weight_bytes(weight: Weight, precision: Precision) -> int:
    """Return the bytes of a parameter of the base model, as policy/load.py loads it."""
    if precision == "nf4" and weight.quantised:
        return nf4_bytes(weight.count)
    return weight.count * element_size(precision)


def nf4_bytes(count: int) -> int:
    """Return the bytes of ``count`` weights in bitsandbytes' NF4 with double quantisation.

    (QLoRA, Dettmers et al. 2023.) Two codes take a byte; 64 weights share an 8-bit scale, and 256
    scales a float32 one; there are tables of 16 and 256 float32 numbers, and an offset.
    """
    scales = -(-count // 64)
    return -(-count // 2) + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)


def optimizer_bytes(trained: tuple[int, ...], name: str) -> int:
    """Return the bytes of the optimizer's states on a GPU.

    AdamW has two float32 moments, and a step count for each tensor. 8-bit AdamW has two bytes for
    each element and two float32 numbers for each 256; tensors under 4096 elements stay in float32.

    Args:
        trained: number of elements of each trained tensor.
        name: ``adamw`` or ``adamw_8bit``.
    """
    if name == "adamw":
        return sum(8 * n + 4 for n in trained)
    tables = 2 * 256 * 4 if any(n >= 4096 for n in trained) else 0
    return tables + sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in trained)


def moved_states(shape: ModelShape, request: Request) -> int:
    """Return the bytes of optimizer states that are in host memory between updates."""
    if not request.optim.offload:
        return 0
    small = 8 if request.optim.name == "adamw" else 2
    return sum(n * (small if n >= 4096 else 8) for n in shape.trained)


def _static(shape: ModelShape, request: Request, precision: Precision) -> list[Term]:
    terms: list[Term] = []
    kept = {True: "NF4 + double quantisation", False: "fp32" if precision == "fp32" else "bf16"}
    sizes: dict[str, int] = {}
    for weight in shape.weights:
        if weight.group == "embeddings" and request.model.offload_embeddings is True:
            continue
        label = kept[precision == "nf4" and weight.quantised]
        name = f"base: {weight.group}, {label}"
        sizes[name] = sizes.get(name, 0) + weight_bytes(weight, precision)
        if weight.layer is not None and weight.layer < request.streamed:
            sizes[name] -= streamed_bytes(weight, precision)
    terms += [Term(name, size, size, loaded=True) for name, size in sizes.items()]
    if slots := slot_bytes(blocks(shape, request, precision)):
        terms.append(Term(f"base: {SLOTS} slots for streamed layers", slots, slots, loaded=True))
    # PEFT keeps adapters in float32 (policy/lora.py).
    adapters = 4 * (sum(shape.trained) + shape.reference)
    terms.append(Term("LoRA: weights, fp32", adapters, adapters, loaded=True))
    terms.append(Term("LoRA: gradients, fp32", 0, 4 * sum(shape.trained)))
    name = "adamw_8bit" if request.optim.name == "auto" else request.optim.name
    moving = moved_states(shape, request)
    states = optimizer_bytes(shape.trained, name) - moving
    terms.append(Term(f"LoRA: optimizer states, {name}", states, states))
    if moving:
        terms.append(Term("LoRA: optimizer states, in its step", 0, moving, moment=True))
    if precision == "nf4":
        # kernels/nf4/ahead.py has BUFFERS of them; bitsandbytes' own products make one at a time.
        count = BUFFERS if any(layer.on_kernels for layer in shape.layers) else 1
        buffers = count * shape.largest_matrix * 2
        terms.append(Term(f"dequantised matrices, {count} of the largest", buffers, buffers))
    return terms


# --- the update ----------------------------------------------------------------------------------


def _activations(shape: ModelShape, request: Request, precision: Precision) -> list[Term]:
    size, tokens = element_size(precision), request.microbatch
    stream, placements = request.micro_batch_stream(), request.placed(len(shape.layers))
    again: list[LayerMemory] = []
    kept: list[LayerMemory] = []
    inputs = 0
    for layer, placement in zip(shape.layers, placements, strict=True):
        rows = None if placement is None or placement.mlp_rows is None else tokens
        memory = layer_memory(layer, shape.hidden, size, stream, shape.attention, placement, rows)
        (kept if placement is None else again).append(memory)
        inputs += held_bytes(layer, shape.hidden, size, placement, "device")
    head = head_bytes(shape, tokens, precision)
    terms = [Term("activations: layer inputs (estimate)", 0, tokens * inputs)]
    if passing := _passing(shape, size, placements):
        terms.append(Term("activations: between GPU and host (estimate)", 0, tokens * passing))
    whole = int(tokens * sum(m.kept for m in kept))
    if kept:
        # The kernels' padded copies of adapters (kernels/lora: autograd.Adapters, mlp.Parts).
        rank = request.lora.rank
        padded = (rank + -rank % ALIGNMENT) / rank * len(kept) / len(shape.layers)
        whole += int(size * sum(shape.trained) * padded) if shape.layers[0].on_kernels else 0
        work = max(m.at_work(tokens) - tokens * m.kept for m in kept)
        name = f"activations: {len(kept)} layers kept, and one's backward (estimate)"
        terms.append(Term(name, 0, whole + int(work), moment=True))
    if again:  # the layers kept are the last ones, whose memory is free by then
        work = max(m.at_work(tokens) for m in again)
        name = "activations: one layer's forward and backward (estimate)"
        terms.append(Term(name, 0, int(work), moment=True))
    with_kept = " with the layers kept" if kept else ""
    return [*terms, Term(f"linear_logprob{with_kept}", 0, whole + head, moment=True)]


def held_bytes(
    layer: Layer, hidden: int, size: int, placement: Placement | None, place: Place
) -> int:
    """Return the bytes a token that a layer holds in a place from its forward to its backward.

    For a layer that keeps all its activations this is its input only.
    """
    if placement is None:
        return hidden * size if place == "device" else 0
    held = hidden * size if placement.input == place else 0
    held += attention_results(layer, size) if placement.attention == place else 0
    projected = (layer.queries + 2 * layer.keys + hidden) * size
    return held + (projected if placement.projections == place else 0)


def _passing(shape: ModelShape, size: int, placements: Placements) -> int:
    """Return the bytes a token of a layer's tensors being fetched, and of the input at work."""
    pairs = zip(shape.layers, placements, strict=True)
    most = max(held_bytes(layer, shape.hidden, size, p, "host") for layer, p in pairs)
    return most + shape.hidden * size if most else 0


def host_bytes(shape: ModelShape, request: Request) -> int:
    """Return the bytes of host memory for activations, the base's parts and optimizer states."""
    precision = precision_of(request.model, shape)
    size = element_size(precision)
    pairs = zip(shape.layers, request.placed(len(shape.layers)), strict=True)
    held = sum(held_bytes(layer, shape.hidden, size, p, "host") for layer, p in pairs)
    table = size * shape.embedding if request.model.offload_embeddings is True else 0
    streamed = sum(blocks(shape, request, precision))
    running = request.microbatch * held + table + streamed + moved_states(shape, request)
    if not streamed:
        return running
    # The whole base is loaded to the host before its layers go where they belong.
    return max(running, streamed + sum(weight_bytes(w, precision) for w in shape.weights))


def head_bytes(shape: ModelShape, tokens: int, precision: Precision) -> int:
    """Estimate the bytes of linear_logprob and the hidden states before it, if all tokens count."""
    size, fused = element_size(precision), precision != "fp32"
    rows = min(tokens, most_rows(shape.vocabulary, torch.device("cuda"), fused))
    # The decoder's output and the scored copy, which the gradient overwrites.
    hidden = 2 * tokens * shape.hidden * size
    # A chunk has odds in the compute type, or float32 logits and odds; their product with the head
    # in float32; and the normed rows.
    chunk = rows * (shape.vocabulary * (size if fused else 8) + shape.hidden * (4 + size))
    if shape.head_rank:
        # An adapted head is copied together with its adapter, and so are the hidden states.
        copied = (shape.vocabulary + tokens) * (shape.hidden + shape.head_rank) * size
        hidden += copied + 4 * shape.vocabulary * shape.head_rank + tokens * shape.hidden * size
    return hidden + chunk
