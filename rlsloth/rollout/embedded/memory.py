"""Memory of the engine that samples with the trained model itself."""

from __future__ import annotations

from rlsloth.memory.activations import prefill_memory
from rlsloth.memory.shape import ModelShape
from rlsloth.memory.terms import Precision, Term, element_size
from rlsloth.memory.workload import EngineMemory, Sampling

PREFILL_TOKENS = 8192
"""rollout.embedded.engine.PREFILL_TOKENS: padded prompt tokens of one prefill."""
COLUMNS = 128
"""rollout.embedded.decode.COLUMNS: the length of a graphed cache is a multiple of it."""
NF4_ROWS = 256
"""kernels.lora.op.DECODED_ROWS: decoding steps of more rows use dequantised matrices."""


def slots_shape(shape: ModelShape, sampling: Sampling) -> tuple[int, int]:
    """Rows and tokens of the engine's slots (rollout.embedded.decode.Decoder.cache)."""
    rows, length = sampling.at_once, sampling.workload.one_turn(shape)
    if sampling.rollout.cuda_graphs:
        rows, length = 1 << (rows - 1).bit_length(), -(-length // COLUMNS) * COLUMNS
    return rows, length


def embedded_terms(
    shape: ModelShape, sampling: Sampling, precision: Precision, _context: int
) -> list[Term]:
    """Slots (rollout.embedded.slot_cache.SlotCache), a decoding step, a prefill, sampling. Slots
    grow with a rollout: ``context``, which tools may fill, is not allocated ahead."""
    size = element_size(precision)
    rows, length = slots_shape(shape, sampling)
    slots = shape.kv_width * rows * length * size
    logits = 4 * rows * shape.vocabulary
    # A step's activations, of which decoding attention writes scores out in float32: raw, scaled,
    # masked, softmax and the softmax rounded. They stay reserved in the pool of the graphs.
    layers = shape.layers
    step = max(prefill_memory(layer, shape.hidden, size) for layer in layers)
    step += max(layer.heads for layer in layers) * length * (16 + size)
    pool = int(rows * step)
    if precision == "nf4" and rows > NF4_ROWS:
        pool += 2 * shape.largest_matrix * 2
    graphed = sampling.rollout.cuda_graphs
    kept = "kept between steps" if graphed else "freed after sampling"
    longest_prompt = sampling.workload.longest_prompt
    prompts = sampling.workload.prompts
    tokens = max(min(PREFILL_TOKENS, prompts * longest_prompt), longest_prompt)
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


EMBEDDED_MEMORY = EngineMemory("transformers", "embedded engine", embedded_terms)
