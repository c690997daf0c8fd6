"""Choose the size of a micro-batch and the placement of activations that take the least time.

The candidates are few: micro-batches of certain sizes, and modes, which place the first layers in
one way and as many of the last ones as fit in another. Times are relative, by counting
multiplications: they rank candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from rlsloth.config import MICROBATCH
from rlsloth.memory.plan import KEPT_FREE, held_bytes, precision_of
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.streamed import blocks, exposed_seconds, layer_counts
from rlsloth.memory.terms import Plan, element_size
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Place, Placement, Placements
from rlsloth.policy.attention.backends import BACKENDS

MICROBATCHES = (
    *range(65536, 16384, -8192), *range(16384, 8192, -2048), *range(8192, 4096, -1024),
    *range(4096, 0, -512),
)  # fmt: skip
"""Sizes of a micro-batch in tokens to choose from."""
TILES = 8192, 2048
"""Tokens of an MLP's tile: large enough for products to run at full speed, and nearly so."""
ATTENTION_PARTS = 4
"""Parts in which attention's backward is computed if its buffers bind."""
NOT_AGAIN = 0.27
"""Share of a layer's linear products, the MLP's last one, that the second forward leaves out."""
FLOPS_PER_BYTE = 13_000
"""Floating-point operations for each byte copied to the host (650 TFLOP/s and 50 GB/s on an H100):
below this ratio the copies are not hidden behind the work."""
OPS_PER_S = 4e14
"""Floating-point operations a second in an update, on an H100."""
LAYER_S = 5e-3, 7.5e-3
"""Seconds in which the host starts a layer's kernels, in a micro-batch: without and with a second
forward. Small micro-batches take this long (an H200's host took 2.7 times as much)."""
LOOKUP_S_PER_BYTE = 5e-11
"""Seconds to read a byte of an embedding in host memory."""
DEQUANTISED = 2.5e-12
"""Seconds to dequantise a weight from NF4: 2.5 bytes at 3 TB/s, 3 times for each micro-batch."""


@dataclass(frozen=True, slots=True)
class Mode:
    """Two placements: one of the first layers, and one of as many of the last ones as fit."""

    first: Placement | None
    last: Placement | None

    def placements(self, layers: int, last: int) -> Placements:
        """Place each layer."""
        return (self.first,) * (layers - last) + (self.last,) * last

    def most(self, layers: int) -> int:
        """Return the largest number of layers that may have the second placement."""
        return 0 if self.first == self.last else layers - 1


def modes(checkpointing: bool | str, backend: str, *, projections: bool = False) -> list[Mode]:
    """List the modes that ``model.gradient_checkpointing`` allows.

    Args:
        checkpointing: the option's value.
        backend: name of the attention backend; some cannot keep attention's results.
        projections: whether layers can keep the results of attention's linear layers.
    """
    halves = BACKENDS[backend].halves is not None
    device, host = Placement(), Placement("host")
    parts = ATTENTION_PARTS if halves else 1
    tiled = [Placement("host", attention_parts=parts, mlp_rows=rows) for rows in TILES]
    if checkpointing is False:
        return [Mode(None, None)]
    if checkpointing is True:
        return [Mode(device, device)]
    if checkpointing == "offload":
        return [Mode(p, p) for p in (host, *tiled)]
    attention = [Placement("host", "host"), replace(tiled[0], attention="host")] if halves else []
    if projections:
        attention += [replace(placement, projections="host") for placement in attention]
    offloaded = [host, *attention, *tiled]
    kept = [_on_device(p) for p in offloaded]
    return [
        Mode(None, None),
        *(Mode(p, None) for p in (*kept, *offloaded)),
        *(Mode(p, _on_device(p)) for p in offloaded),
    ]


def _on_device(placement: Placement) -> Placement:
    """Keep on the GPU what a placement keeps in host memory."""
    attention: Place | None = None if placement.attention is None else "device"
    projections: Place | None = None if placement.projections is None else "device"
    return replace(placement, input="device", attention=attention, projections=projections)


def choose(
    plan: Callable[[Request], Plan], shape: ModelShape, request: Request, least: int
) -> Request:
    """Choose ``tokens_per_microbatch``, placements and the places of weights, if they are open.

    The update must leave a share KEPT_FREE of the GPU. As few layers' weights are in host memory as
    that allows, since each decoding step copies them; if nothing is sampled, more if the larger
    micro-batches make up for it. If nothing fits, the result is ``least`` tokens in the mode that
    needs the least memory.

    Args:
        plan: function that plans a request.
        shape: the model's sizes.
        request: the run.
        least: smallest possible number of tokens in a micro-batch.
    """
    named, counts = request.tokens_per_microbatch, layer_counts(shape, request)
    on_kernels = all(layer.on_kernels for layer in shape.layers)
    checkpointing = request.model.gradient_checkpointing
    allowed = modes(checkpointing, shape.attention, projections=on_kernels)
    frugal = request.with_embeddings(embedding_places(shape, request)[-1])
    frugal = frugal.with_update(named or least, allowed[-1].placements(len(shape.layers), 0))
    tried: list[Request] = []
    fastest: Request | None = None
    for count in counts:
        smallest = plan(frugal.with_layers(count))
        if smallest.peak("update") > (1 - KEPT_FREE) * smallest.total and not request.overlap:
            if count == 0 and request.sampling is not None and smallest.fits:
                return frugal.with_layers(0)  # streamed layers would slow down each sampled token
            continue
        best = _choose(plan, shape, request.with_layers(count), least, allowed)
        if best is not None and plan(best).fits:
            if count == 0 or request.sampling is not None:
                return best
            if fastest and relative_time(shape, best) >= relative_time(shape, fastest):
                break
            fastest = best
        tried += [] if best is None else [best]  # its rollouts need more layers in host memory
    if fastest is not None:
        return fastest
    fallbacks = [frugal.with_layers(count) for count in reversed(counts)]
    fits = next((run for run in fallbacks if plan(run).fits), None)
    return fits or next((run for run in (*tried, *fallbacks) if plan(run).fits_host), fallbacks[-1])


def _choose(
    plan: Callable[[Request], Plan],
    shape: ModelShape,
    request: Request,
    least: int,
    allowed: list[Mode],
) -> Request | None:
    """Choose all but the number of layers in host memory; None if no update fits."""
    named, layers = request.tokens_per_microbatch, len(shape.layers)
    runs = [request.with_embeddings(offload) for offload in embedding_places(shape, request)]
    if request.overlap:  # the cache then takes all the room that the update leaves
        automatic = request.model.gradient_checkpointing == "auto"
        mode = Mode(Placement(), Placement()) if automatic else allowed[0]
        return runs[0].with_update(named or max(MICROBATCH, least), mode.placements(layers, 0))
    most = request.most_tokens or MICROBATCHES[0]
    sizes = [named] if named else sorted({max(min(n, most), least) for n in MICROBATCHES})[::-1]
    tried = []
    for run in runs:
        for tokens in sizes:
            for mode in allowed:
                best_case = run.with_update(tokens, mode.placements(layers, mode.most(layers)))
                tried.append((relative_time(shape, best_case), tokens, run, mode))
    tried.sort(key=lambda one: one[0])
    best: tuple[float, Request] | None = None
    for bound, tokens, run, mode in tried:
        if best is not None and bound >= best[0]:
            break
        candidate = partial(_candidate, run, layers, tokens, mode)
        found = fitting(plan, candidate, mode.most(layers), 1 - KEPT_FREE)
        if found is not None and (best is None or relative_time(shape, found) < best[0]):
            best = relative_time(shape, found), found
    return None if best is None else best[1]


def _candidate(request: Request, layers: int, tokens: int, mode: Mode, last: int) -> Request:
    return request.with_update(tokens, mode.placements(layers, last))


def embedding_places(shape: ModelShape, request: Request) -> tuple[bool, ...]:
    """List the allowed values of ``model.offload_embeddings``, the fastest one first."""
    if request.model.offload_embeddings != "auto":
        return (request.model.offload_embeddings,)
    if request.sampling is not None and request.sampling.engine.shares_weights:
        return (False,)
    return (False, True) if shape.embedding else (False,)


def most_frugal(backend: str, layers: int) -> Placements:
    """Place activations where they need the least of the GPU's memory.

    Args:
        backend: name of the attention backend.
        layers: number of decoder layers.
    """
    return modes("offload", backend)[-1].placements(layers, 0)


def fitting(
    plan: Callable[[Request], Plan],
    candidate: Callable[[int], Request],
    most: int,
    share: float = 1.0,
) -> Request | None:
    """Give as many of the last layers as fit the GPU a mode's second placement.

    Args:
        plan: function that plans a request.
        candidate: makes the request with so many layers of the second placement.
        most: largest number of such layers.
        share: share of the GPU that the update may use.

    Returns:
        The request; None if GPU or host have no room for any number of layers.
    """

    def fits(last: int) -> bool:
        made = plan(candidate(last))
        return made.peak("update") <= share * made.total

    if not fits(0):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    # The second placement needs no more of the host than the first.
    return candidate(low) if plan(candidate(low)).fits_host else None


def relative_time(shape: ModelShape, request: Request) -> float:
    """Estimate the time of an update, for each token that it trains on, up to a constant factor."""
    tokens, stream = request.microbatch, request.micro_batch_stream()
    precision = precision_of(request.model, shape)
    length = stream.prompt + stream.completion
    linear = linear_weights(shape) / len(shape.layers)  # multiplications a token and layer
    total = 0.0
    pairs = Counter(zip(shape.layers, request.placed(len(shape.layers)), strict=True))
    for (layer, placement), count in pairs.items():
        copied = held_bytes(layer, shape.hidden, element_size(precision), placement, "host")
        known = 0.0
        if placement is not None and placement.projections is not None:
            known = (2 * layer.queries + 2 * layer.keys) * shape.hidden
        total += count * _layer_time(linear, layer.queries * length, placement, copied)
        total -= count * known
    seconds = 2 * total / OPS_PER_S
    if precision == "nf4":
        seconds += 3 * DEQUANTISED * linear_weights(shape) / tokens
    again = sum(placement is not None for placement in request.placed(len(shape.layers)))
    started = (len(shape.layers) - again) * LAYER_S[0] + again * LAYER_S[1]
    seconds = max(seconds, started / tokens)
    if request.streamed:
        mean = sum(layer.queries for layer in shape.layers) * length / len(shape.layers)
        forward = 2 * tokens * (linear + mean) / OPS_PER_S
        backward = tokens * seconds / len(shape.layers) - forward
        sizes = blocks(shape, request, precision)
        seconds += exposed_seconds(sizes, forward, backward) / tokens
    if request.model.offload_embeddings is True:
        seconds += shape.hidden * element_size(precision) * LOOKUP_S_PER_BYTE
    # A completion's prompt is computed again in each micro-batch that holds a part of its group.
    held = max(1.0, min(stream.group, (tokens - stream.prompt) / stream.completion))
    return seconds * (stream.prompt / held + stream.completion) / stream.completion


def linear_weights(shape: ModelShape) -> int:
    """Return the number of weights of the linear layers that a token is multiplied with."""
    experts = sum(3 * layer.chosen * layer.width * shape.hidden for layer in shape.layers)
    return experts + sum(linear.out * linear.into for linear in shape.fused)


def _layer_time(linear: float, attention: float, placement: Placement | None, copied: int) -> float:
    """Count the multiplications of one layer for a token, and ``copied`` bytes in their terms."""
    # Two products for each weight (none for its own gradient), and 3.5 of attention's for one.
    total = 2 * linear + 3.5 * attention
    if placement is None:
        return total
    total += (1 - NOT_AGAIN) * linear + attention * (placement.attention is None)
    total += max(0.0, copied * FLOPS_PER_BYTE / 2 - linear - attention)
    # Copies and tiles cost a little even where they are hidden.
    tiles = 0.0 if placement.mlp_rows is None else 80 / placement.mlp_rows
    return total * (1 + 0.002 * (copied > 0) + tiles)
