"""The estimated seconds of a step, which rank micro-batches and placements.

The GPU's work is counted in multiplications, and compared with the time in which the host starts
kernels and with copies. Estimates are for ranking: rlsloth prints none of them as a prediction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from rlsloth.memory.plan import precision_of
from rlsloth.memory.shape import Layer, ModelShape, layer_kinds, linear_weights
from rlsloth.memory.streamed import blocks, exposed_seconds
from rlsloth.memory.terms import element_size
from rlsloth.memory.update import PlacedKind, held_bytes, placed_kinds
from rlsloth.memory.workload import Request
from rlsloth.policy.activations.placement import Placement

BUSY = 0.7
"""Share of a card's products that an update reaches. Measured on an H200: 0.57 of them with a
micro-batch of 29,176 tokens, and 0.7 with one of 8,192 (Qwen3's 8B shape, NF4). The larger share,
because a faster GPU hides fewer copies."""
NOT_AGAIN = 0.27
"""Share of a layer's linear products, the MLP's last one, that the second forward leaves out."""
STARTED = 8e-3, 12e-3
"""Seconds in which the host starts a layer's kernels, forward and backward, in a micro-batch of any
size: without and with a second forward. Measured with one: 10e-3 on an H200's host
(docs/PERFORMANCE.md), 7.5e-3 on an H100's; a fifth more, since a GPU that is done sooner waits, so
that small micro-batches and many tiles take this long on a slower host."""
TILE_STARTED, PART_STARTED = 0.5, 0.1
"""Shares of these seconds for each further tile of the MLP, and each further part of attention's
backward: about so many of a layer's kernels are theirs."""
LOOKUP = 0.4
"""Share of the bus that reading single rows of an embedding in host memory reaches."""
FETCHED = 0.05
"""Share of its time that an update loses where it fetches layers' weights, even if the copies are
hidden. Measured on an H200: 5.7 % for 5 of 36 layers (docs/PERFORMANCE.md)."""
DEQUANTISED = 2.5e-12
"""Seconds to dequantise a weight from NF4: 2.5 bytes at 3 TB/s, 3 times for each micro-batch."""
DECODED = 0.25e-3
"""Seconds of a decoding step for each layer, without reading its weights: 33 steps of a model of 30
layers take 0.25 s or more with vLLM on an H200 (docs/PERFORMANCE.md)."""
STEP = 65536
"""Tokens of a step whose size is unknown."""


def step_seconds(shape: ModelShape, request: Request) -> float:
    """Estimate the seconds of a step: its update, and copies of weights while it samples."""
    placed = placed_kinds(shape, request.placed(len(shape.layers)))
    embeddings, streamed = request.model.offload_embeddings is True, request.streamed
    return StepTimes(shape, request).seconds(request.microbatch, placed, embeddings, streamed)


def decoding_seconds(shape: ModelShape, request: Request) -> float:
    """Estimate the seconds of a step's sampling, without copies of weights from the host."""
    if request.sampling is None:
        return 0.0
    precision, layers = precision_of(request.model, shape), len(shape.layers)
    head = shape.vocabulary * shape.hidden * element_size(precision)
    read = (sum(blocks(shape, precision, layers)) + head) / (request.card.bandwidth * 1e9)
    return _decoding_steps(request) * (read + layers * DECODED)


def _decoding_steps(request: Request) -> int:
    """Return the number of a step's decoding steps, each of which reads all weights."""
    sampling = request.sampling
    if sampling is None:
        return 0
    workload = sampling.workload
    rounds = -(-workload.prompts * workload.group_size // sampling.at_once)
    return rounds * sampling.rollout.max_tokens


class StepTimes:
    """Estimates for one run with different micro-batches, placements and places of weights."""

    def __init__(self, shape: ModelShape, request: Request) -> None:
        """Take what all these have in common from a request."""
        self._shape, self._request = shape, request
        self._precision = precision_of(request.model, shape)
        self._size = element_size(self._precision)
        self._linear = linear_weights(shape) / len(shape.layers)  # multiplications a token
        self._multiplied = BUSY * request.card.tflops * 1e12 / 2  # a second
        self._bus = request.card.bus
        self._loads: dict[int, tuple[list[tuple[float, int]], int]] = {}
        self._layers: dict[tuple[int, int, Placement | None, int], tuple[float, ...]] = {}

    def seconds(
        self, tokens: int, placed: Iterable[PlacedKind], embeddings: bool, streamed: int
    ) -> float:
        """Estimate the seconds of a step.

        Args:
            tokens: value of ``tokens_per_microbatch``.
            placed: the layers with their placements.
            embeddings: whether the embedding is in host memory.
            streamed: number of layers whose weights are in host memory.
        """
        if tokens not in self._loads:
            self._loads[tokens] = self._load(tokens)
        loads, length = self._loads[tokens]
        total = sum(
            count * self._micro_batch(held, length, placed, embeddings, streamed)
            for count, held in loads
        )
        copied = sum(blocks(self._shape, self._precision, streamed))
        return total + _decoding_steps(self._request) * copied / self._bus

    def _load(self, tokens: int) -> tuple[list[tuple[float, int]], int]:
        """Return the number and tokens of a step's micro-batches, and the length of a sequence."""
        request = replace(self._request, tokens_per_microbatch=tokens)
        stream, samples, longest = (
            request.micro_batch_stream(), request.samples, request.longest_example,
        )  # fmt: skip
        length = stream.prompt + stream.completion
        if request.sampling is None and samples is not None and longest is not None:
            held = max(1, tokens // longest)
            full, rest = divmod(samples, held)
            return [(full, held * longest), *[(1, rest * longest)] * (rest > 0)], length
        if request.sampling is None:
            return [(STEP / tokens, tokens)], length
        # A prompt is computed again in each micro-batch that holds a part of its group.
        workload = request.sampling.workload
        held_parts = (tokens - stream.prompt) / stream.completion
        held_parts = max(1.0, min(stream.group, held_parts))
        each = stream.prompt / held_parts + stream.completion
        step = workload.prompts * workload.group_size * each
        return [(step / tokens, tokens) if step > tokens else (1, int(step))], length

    def _micro_batch(
        self,
        tokens: int,
        length: int,
        placed: Iterable[PlacedKind],
        embeddings: bool,
        streamed: int,
    ) -> float:
        """Estimate the seconds of a micro-batch: the GPU's or the host's, whichever are more."""
        work = started = copied = 0.0
        for layer, placement, count in placed:
            key = id(layer), tokens, placement, length
            if key not in self._layers:
                self._layers[key] = self._layer(layer, tokens, placement, length)
            of_layer = self._layers[key]
            work += count * of_layer[0]
            started += count * of_layer[1]
            copied += count * of_layer[2]
        layers = len(self._shape.layers)
        if streamed:
            forward = tokens * (self._linear + self._attention * length) / self._multiplied
            # Copies of activations take the bus for their part of that time.
            forward, backward = (
                max(0.0, part - copied / layers / self._bus)
                for part in (forward, work / layers - forward)
            )
            sizes = blocks(self._shape, self._precision, streamed)
            work += exposed_seconds(sizes, forward, backward, self._bus)
            work *= 1 + FETCHED
        # The head: a product forward, and one backward.
        work += 2 * tokens * self._shape.vocabulary * self._shape.hidden / self._multiplied
        if self._precision == "nf4":
            work += 3 * DEQUANTISED * self._linear * layers
        if embeddings:
            work += tokens * self._shape.hidden * self._size / (LOOKUP * self._bus)
        return max(work, started)

    def _layer(
        self, layer: Layer, tokens: int, placement: Placement | None, length: int
    ) -> tuple[float, ...]:
        """Estimate a layer's seconds on the GPU, those of the host, and its bytes to the host."""
        attention = layer.queries * length
        # Two products for each weight (none for its own gradient), and 3.5 of attention's for one.
        total = 2 * self._linear + 3.5 * attention
        if placement is None:
            return tokens * total / self._multiplied, STARTED[0], 0.0
        hidden = self._shape.hidden
        total += (1 - NOT_AGAIN) * self._linear + attention * (placement.attention is None)
        if placement.projections is not None:
            total -= (layer.queries + 2 * layer.keys) * hidden
        if placement.sum is not None:
            total -= layer.queries * hidden
        copied = held_bytes(layer, hidden, self._size, placement, "host")
        total += max(0.0, copied / self._bus * self._multiplied - self._linear - attention)
        # Copies and tiles cost a little even where they are hidden.
        rows, parts = placement.mlp_rows, placement.attention_parts
        tiles = 1 if rows is None else -(-tokens // rows)
        total *= 1 + 0.002 * (copied > 0) + (80 / rows if rows and tiles > 1 else 0.0)
        more = TILE_STARTED * (tiles - 1) + PART_STARTED * (parts - 1)
        return tokens * total / self._multiplied, STARTED[1] * (1 + more), tokens * copied

    @cached_property
    def _attention(self) -> float:
        """Mean width of the layers' queries."""
        kinds, places = layer_kinds(self._shape)
        return sum(kinds[place].queries for place in places) / len(places)
