"""Choose the size of a micro-batch and the placement of activations that take the least time.

The candidates are few: micro-batches of certain sizes, and modes, in which all layers are placed
alike; then as many of the last layers as fit keep all their activations. Times are relative, by
counting multiplications: they rank candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from rlsloth.config import MICROBATCH
from rlsloth.memory.plan import KEPT_FREE, held_bytes, precision_of
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import Plan, element_size
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Placement, Placements
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
LAYER_S = 4e-4
"""Seconds that a layer's kernels take to start, in a forward and a backward."""
DEQUANTISED = 2.5e-12
"""Seconds to dequantise a weight from NF4: 2.5 bytes at 3 TB/s, 3 times for each micro-batch."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A placement of all layers but the last ones, which keep their activations."""

    placement: Placement | None
    mixes: bool
    """Whether the last layers keep all their activations if there is room."""

    def placements(self, layers: int, kept: int) -> Placements:
        """Place each layer; the last ``kept`` of them keep their activations."""
        return (self.placement,) * (layers - kept) + (None,) * kept


def modes(checkpointing: bool | str, backend: str) -> list[Mode]:
    """List the modes that ``model.gradient_checkpointing`` allows.

    Args:
        checkpointing: the option's value.
        backend: name of the attention backend; some cannot keep attention's results.
    """
    halves = BACKENDS[backend].halves is not None
    device, host = Placement(), Placement("host")
    parts = ATTENTION_PARTS if halves else 1
    tiled = [Placement("host", None, parts, rows) for rows in TILES]
    kept = [Placement("device", "device"), Placement("host", "host")] if halves else []
    if checkpointing is False:
        return [Mode(None, mixes=False)]
    if checkpointing is True:
        return [Mode(device, mixes=False)]
    if checkpointing == "offload":
        return [Mode(p, mixes=False) for p in (host, *tiled)]
    tried = [device, *kept, host, *(replace(p, input="device") for p in tiled), *tiled]
    return [Mode(None, mixes=False), *(Mode(p, mixes=True) for p in tried)]


def choose(
    plan: Callable[[Request], Plan], shape: ModelShape, request: Request, least: int
) -> Request:
    """Choose ``tokens_per_microbatch`` and placements, if they are open.

    The update must leave a share KEPT_FREE of the GPU. If nothing fits, the result is ``least``
    tokens in the mode that needs the least memory.

    Args:
        plan: function that plans a request.
        shape: the model's sizes.
        request: the run.
        least: smallest possible number of tokens in a micro-batch.
    """
    named, layers = request.tokens_per_microbatch, len(shape.layers)
    checkpointing = request.model.gradient_checkpointing
    allowed = modes(checkpointing, shape.attention)
    if request.overlap:  # the cache then takes all the room that the update leaves
        mode = Mode(Placement(), mixes=False) if checkpointing == "auto" else allowed[0]
        return request.with_update(named or max(MICROBATCH, least), mode.placements(layers, 0))

    def fits(candidate: Request) -> bool:
        made = plan(candidate)
        return made.peak("update") <= (1 - KEPT_FREE) * made.total and made.fits_host

    sizes = [named] if named else sorted({max(n, least) for n in MICROBATCHES}, reverse=True)
    tried = []
    for tokens in sizes:
        for mode in allowed:
            most = layers - 1 if mode.mixes else 0
            bound = relative_time(shape, request.with_update(tokens, mode.placements(layers, most)))
            tried.append((bound, tokens, mode))
    tried.sort(key=lambda one: one[0])
    best: tuple[float, Request] | None = None
    for bound, tokens, mode in tried:
        if best is not None and bound >= best[0]:
            break
        found = _most_kept(fits, request, layers, tokens, mode)
        if found is not None and (best is None or relative_time(shape, found) < best[0]):
            best = relative_time(shape, found), found
    if best is not None:
        return best[1]
    return request.with_update(named or least, allowed[-1].placements(layers, 0))


def most_frugal(backend: str, layers: int) -> Placements:
    """Place activations where they need the least of the GPU's memory.

    Args:
        backend: name of the attention backend.
        layers: number of decoder layers.
    """
    return modes("offload", backend)[-1].placements(layers, 0)


def _most_kept(
    fits: Callable[[Request], bool], request: Request, layers: int, tokens: int, mode: Mode
) -> Request | None:
    """Keep as many of the last layers as fit; None if the mode does not fit at all."""

    def candidate(kept: int) -> Request:
        return request.with_update(tokens, mode.placements(layers, kept))

    if not fits(candidate(0)):
        return None
    low, high = 0, layers - 1 if mode.mixes else 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(candidate(middle)) else (low, middle - 1)
    return candidate(low)


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
        total += count * _layer_time(linear, layer.queries * length, placement, copied)
    seconds = 2 * total / OPS_PER_S
    seconds += len(shape.layers) * LAYER_S / tokens
    if precision == "nf4":
        seconds += 3 * DEQUANTISED * linear_weights(shape) / tokens
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
    return total * (1 + 0.005 * (copied > 0) + tiles)
