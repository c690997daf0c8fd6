"""The memory plan of a run on one GPU: sizes of tensors by phase, computed before loading.

Weights, adapters, optimizer states and the embedded engine's cache are counted exactly. Activations
are an estimate (activations.py), within ACTIVATION_TOLERANCE of the measured peak on a CPU.

vLLM's key-value cache gets the room that everything else leaves. It is the only memory that is
freed for the update and allocated again for rollouts.
"""

from __future__ import annotations

from dataclasses import replace

from rlsloth.config import ModelConfig
from rlsloth.kernels.nf4.ahead import BUFFERS
from rlsloth.memory.shape import ModelShape, Weight, layer_kinds, remembered
from rlsloth.memory.streamed import blocks, slot_bytes, streamed_bytes
from rlsloth.memory.terms import Cache, Phase, Plan, Precision, Term, element_size
from rlsloth.memory.trained import moved_states, trained_terms
from rlsloth.memory.update import PlacedKind, held_tensors, placed_kinds, update_terms
from rlsloth.memory.workload import EngineMemory, Request, Sampling
from rlsloth.policy.activations.arena import arena_bytes
from rlsloth.policy.gpu_limit import CONTEXT
from rlsloth.policy.streamed_layers import SLOTS

ACTIVATION_TOLERANCE = 0.12
"""Relative error of the estimate on a CPU, for nine families (tests/memory/test_plan.py)."""
KEPT_FREE = 0.1
"""Share of a GPU that the decision leaves free for errors of the estimate and fragmentation."""
MEASURED_FREE = 0.025
"""That share where the estimate is measured: whole layers, without sampling, by the backend fa4.

There the plan was up to 1.4 % too low, and a run under a limit lost no speed with torch's peak at
98 % of what it may take (docs/PERFORMANCE.md): torch gives unused blocks back before it fails.
"""
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
    placed = placed_kinds(shape, request.placed(len(shape.layers)))
    terms += update_terms(shape, request, precision, placed)
    terms.append(Term("CUDA context, kernels (allowance)", CONTEXT, CONTEXT, loaded=True))
    host = host_bytes(shape, request, placed)
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
    own = max(1, context - sampling.workload.longest_prompt)
    sizes = [engine.completion_bytes(shape, kind, tokens, size) for tokens in (context, own)]
    return _with_cache(plan, engine.title, (sizes[0], sizes[1]), sampling, context, free)


def precision_of(model: ModelConfig, shape: ModelShape) -> Precision:
    """Return the precision of the base model's weights on a GPU."""
    if shape.stored_in_nf4:
        return "nf4"
    return "bf16" if model.precision == "auto" else model.precision


def kept_free(shape: ModelShape, request: Request, parts: bool = False) -> float:
    """Return the share of the GPU that a decision on the update leaves free.

    Args:
        shape: the model's sizes.
        request: the run.
        parts: whether layers are computed in parts (tiles of the MLP, groups of attention's heads).
    """
    dense = all(
        layer.on_kernels and not (layer.chosen or layer.scores or layer.window)
        for layer in layer_kinds(shape)[0]
    )
    measured = request.sampling is None and shape.attention == "fa4" and dense and not parts
    return MEASURED_FREE if measured else KEPT_FREE


def _with_cache(
    plan: Plan,
    title: str,
    sizes: tuple[int, int],
    sampling: Sampling,
    context: int,
    free: int | None,
) -> Plan:
    """Add the engine's cache to a plan, in the room that other terms leave.

    ``sizes`` are the bytes of a completion with its prompt, and without.

    A small cache is kept in both phases, a larger one only for rollouts, unless they overlap with
    the update.
    """
    overlap = sampling.rollout.overlap
    phases: tuple[Phase, ...] = ("rollout", "update") if overlap else ("rollout",)
    room = min(plan.total - plan.peak(phase) for phase in phases)
    if free is not None:
        room = min(room, *(free - plan.peak(phase, to_come=True) for phase in phases))
    group = sampling.workload.sharing
    cache = fit_cache(sizes[0], sampling.at_once, context, room, further=sizes[1], group=group)
    left = plan.total - plan.peak("update")
    if free is not None:
        left = min(left, free - plan.peak("update", to_come=True))
    fits_both = cache.size + KEPT_FREE * plan.total <= left
    stays = overlap or (fits_both and SMALL_CACHE * cache.size <= plan.total)
    name = f"{title}: key-value cache, {max(1, cache.holds)} x {context}"
    term = Term(name, cache.size, cache.size if stays else 0)
    return replace(plan, terms=(*plan.terms, term), cache=replace(cache, stays=stays))


def fit_cache(
    one: int, asked: int, context: int, room: int, *, further: int | None = None, group: int = 1
) -> Cache:
    """Size a key-value cache, in which the completions of a group share their prompt.

    Completions that do not fit wait, or are started again if the cache runs out of room.

    Args:
        one: bytes of one completion with its prompt.
        asked: number of completions to decode at once.
        context: number of tokens of the longest prompt with its completion.
        room: bytes that are available.
        further: bytes of a further completion of the same prompt; ``one`` by default.
        group: number of completions that share a prompt.
    """
    if room < one:
        return Cache(one, asked, 0, context)
    further = one if further is None else further
    groups, rest = divmod(room, one + (group - 1) * further)
    holds = groups * group + (1 + (rest - one) // further if rest >= one else 0)
    size = -(-asked // group) * (one - further) + asked * further
    return Cache(min(size, room), asked, min(asked, holds), context)


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


@remembered
def _base(
    shape: ModelShape, precision: Precision, embeddings: bool, streamed: int
) -> tuple[Term, ...]:
    """Return the rows of the base model's weights on the GPU.

    Args:
        shape: the model's sizes.
        precision: the base model's precision.
        embeddings: whether the embedding is there.
        streamed: number of layers whose weights are not.
    """
    other = "16 bits" if precision == "nf4" else precision
    sizes: dict[str, int] = {}
    for weight in shape.weights:
        if weight.group == "embeddings" and not embeddings:
            continue
        packed = precision == "nf4" and weight.quantised
        name = f"base: {weight.group}, {'NF4 + double quantisation' if packed else other}"
        sizes[name] = sizes.get(name, 0) + weight_bytes(weight, precision)
        if weight.layer is not None and weight.layer < streamed:
            sizes[name] -= streamed_bytes(weight, precision)
    if slots := slot_bytes(blocks(shape, precision, streamed)):
        sizes[f"base: {SLOTS} slots for streamed layers"] = slots
    return tuple(Term(name, size, size, loaded=True) for name, size in sizes.items())


def _static(shape: ModelShape, request: Request, precision: Precision) -> list[Term]:
    on_gpu = request.model.offload_embeddings is not True
    terms = [*_base(shape, precision, on_gpu, request.streamed)]
    terms += trained_terms(shape, request, precision)
    if shape.dora_weights:
        built = 4 * shape.dora_weights
        terms.append(Term("DoRA: weights of the largest layer, fp32", built, built))
    if precision == "nf4":
        # kernels/nf4/ahead.py has BUFFERS of them; bitsandbytes' own products make one at a time.
        count = BUFFERS if any(layer.on_kernels for layer in layer_kinds(shape)[0]) else 1
        buffers = count * shape.largest_matrix * 2
        terms.append(Term(f"dequantised matrices, {count} of the largest", buffers, buffers))
    return terms


def host_bytes(shape: ModelShape, request: Request, placed: list[PlacedKind]) -> int:
    """Return the bytes of host memory for activations, the base's parts and optimizer states."""
    precision = precision_of(request.model, shape)
    size = element_size(precision)
    held = arena_bytes(
        (request.microbatch * tensor, count)
        for layer, placement, count in placed
        for tensor in held_tensors(layer, shape.hidden, size, placement, "host")
    )
    table = size * shape.embedding if request.model.offload_embeddings is True else 0
    sizes = blocks(shape, precision, request.streamed)
    streamed = sum(sizes)
    # The weights before training, and the trained ones while those take their place.
    start = 2 * size * sum(shape.trained) if shape.whole else 0
    running = held + table + streamed + start + moved_states(shape, request)
    if not streamed:
        return running
    # The whole base is loaded to the host before its layers go where they belong, one by one: a
    # layer's tensors are freed once it is copied. Those of NF4 are small, and stay with the heap.
    base = sum(term.update for term in _base(shape, precision, True, 0))
    return max(running, base + (streamed if precision == "nf4" else max(sizes)))
