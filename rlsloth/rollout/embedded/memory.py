"""GPU memory of the embedded engine, in bytes."""

from __future__ import annotations

from rlsloth.memory.activations import prefill_memory
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import Precision, Term, element_size
from rlsloth.memory.workload import EngineMemory, Sampling

PREFILL_TOKENS = 8192
"""Padded prompt tokens of one prefill (rollout.embedded.batch.PREFILL_TOKENS)."""
COLUMNS = 128
"""The length of a cache with CUDA graphs is a multiple of it (rollout.embedded.decode.COLUMNS)."""
MOST_SEQUENCES = 1024
"""Rows of the cache that ``rollout.max_sequences: auto`` asks for at most: graphs are captured for
each power of two, and beyond this number a step's time grows with its rows."""
NF4_ROWS = 256
"""Decoding steps of more rows use dequantised matrices (kernels.lora.op.DECODED_ROWS)."""


def slots_shape(shape: ModelShape, sampling: Sampling) -> tuple[int, int]:
    """Return the rows and length of the engine's cache (rollout.embedded.decode.Decoder.cache)."""
    rows, length = sampling.at_once, sampling.workload.one_turn(shape)
    if sampling.rollout.cuda_graphs:
        rows, length = 1 << (rows - 1).bit_length(), -(-length // COLUMNS) * COLUMNS
    return rows, length


def embedded_terms(
    shape: ModelShape, sampling: Sampling, precision: Precision, _context: int
) -> list[Term]:
    """List the engine's memory: the cache's slots, a decoding step, a prefill, and sampling.

    Slots (rollout.embedded.slot_cache.SlotCache) grow with a rollout: the context, which tools may
    fill, is not allocated in advance.
    """
    size = element_size(precision)
    rows, length = slots_shape(shape, sampling)
    slots = shape.kv_width * rows * length * size
    logits = 4 * rows * shape.vocabulary
    # Activations of a step. Decoding attention writes its scores in float32 (raw, scaled, masked,
    # softmax) and rounded. They stay reserved in the pool of the graphs.
    layers = shape.layers
    step = max(prefill_memory(layer, shape.hidden, size) for layer in layers)
    step += max(layer.heads for layer in layers) * length * (16 + size)
    pool = int(rows * step)
    if precision == "nf4" and rows > NF4_ROWS:
        pool += 2 * shape.largest_matrix * 2
    graphed = sampling.rollout.cuda_graphs
    kept = "kept between steps" if graphed else "freed after sampling"
    tokens = prefill_tokens(shape, sampling)
    widest = max(prefill_memory(layer, shape.hidden, size) for layer in layers)
    prefill = tokens * (widest + shape.kv_width * size)
    # rollout.embedded.sampling.draw: sums, their running maximum and its int64 places; top-p sorts.
    drawing = (16 if sampling.rollout.top_p >= 1 else 32) * rows * shape.vocabulary
    return [
        Term(f"key-value slots {rows} x {length}, {kept}", slots, slots if graphed else 0),
        Term("logits, decoding step", logits + pool, logits + pool if graphed else 0),
        Term(f"prefill of {tokens} tokens (estimate)", int(prefill), 0, moment=True),
        Term("sampling", drawing, 0, moment=True),
    ]


def prefill_tokens(shape: ModelShape, sampling: Sampling) -> int:
    """Return the tokens of the largest prefill (rollout.embedded.batch.Batch.next_groups)."""
    workload = sampling.workload
    # Only groups that find rows are computed. In a further turn each rollout is one, and its prefix
    # is all that it holds.
    single = workload.single_turn
    longest = workload.longest_prompt if single else workload.one_turn(shape)
    groups = sampling.at_once // (workload.sharing if single else 1)
    return max(min(PREFILL_TOKENS, groups * longest), longest)


EMBEDDED_MEMORY = EngineMemory("transformers", "embedded engine", MOST_SEQUENCES, embedded_terms)
