"""Memory of vLLM on the trainer's base weights in bytes, and the size of its key-value cache."""

from __future__ import annotations

from rlsloth.kernels.nf4.op import MAX_ROWS
from rlsloth.memory.shape import Layer, ModelShape
from rlsloth.memory.terms import GIB, Precision, Term, element_size
from rlsloth.memory.workload import EngineMemory, Sampling

BLOCK = 32
"""Tokens of a key-value block, or a multiple of it (rollout.vllm.start.BLOCK)."""
BATCHED_TOKENS = 8192
"""Prompt tokens computed in one step (rollout.vllm.start.BATCHED_TOKENS)."""
MOST_SEQUENCES = 1024
"""Sequences that ``rollout.max_sequences: auto`` asks vLLM for at most.

vLLM reserves memory for all of them, whether they come or not: 16 bytes a row and word of the
vocabulary to sample (2 GiB for 1024 rows of 128,256 words), and the rows' buffers in CUDA graphs.
Its graphs (rollout.vllm.start.GRAPHED) end here, too: at larger sizes starting a step's kernels no
longer takes a noticeable share of its time, and each further graph makes the start longer.
"""
SPLITS = 32
"""Largest number of parts into which attention in CUDA graphs splits a sequence: vLLM's
``flash_attn_max_num_splits_for_cuda_graph``. Only FlashAttention 3 (Hopper) splits."""
ALLOWANCE = int(0.6 * GIB)
"""Bytes of CUDA graphs, workspaces and the kernels loaded with them. With the other terms of memory
after vLLM's start this makes 0.96 GiB for 8 layers of an 8B model and 512 sequences;
examples/benchmarks/rollout_speed.py measured 0.98 GiB on an H100."""


def vllm_terms(
    shape: ModelShape, sampling: Sampling, precision: Precision, context: int
) -> list[Term]:
    """List vLLM's memory without its key-value cache.

    Args:
        shape: the model's.
        sampling: the run's sampling.
        precision: the base model's.
        context: tokens of the longest prompt with its completion.
    """
    size, rows = element_size(precision), sampling.at_once
    experts = size * sum(weight.count for weight in shape.weights if weight.group == "experts")
    slots = size * sum(linear.rank * (linear.into + linear.out) for linear in shape.fused)
    # For many rows the product dequantises a matrix; graphs keep one more in their pool.
    quantised = [f for f in shape.fused if precision == "nf4" and f.quantised]
    matrix = size * max((f.out * f.into for f in quantised), default=0)
    token = max(_token_bytes(layer, shape.hidden, size) for layer in shape.layers)
    # Attention's partial results are float32.
    splits = 4 * SPLITS * max(layer.queries for layer in shape.layers)
    graphs = ALLOWANCE + rows * (token + splits) + (matrix if rows > MAX_ROWS else 0)
    tokens = min(max(BATCHED_TOKENS, rows), rows * context)
    prefill, drawing = tokens * token + matrix, _sampling_bytes(shape, sampling, rows)
    terms = []
    if experts:  # not shared (rollout.vllm.weights.SharedConfig)
        terms.append(Term("vLLM: its own copy of the experts", experts, experts))
    terms.append(Term("vLLM: its copy of the adapter", slots, slots))
    terms += [
        Term("vLLM: CUDA graphs, workspaces (allowance)", graphs, graphs),
        Term(f"vLLM: prefill of {tokens} tokens (estimate)", prefill, 0, moment=True),
        Term("vLLM: logits, sampling", drawing, 0, moment=True),
    ]
    if sampling.rollout.overlap:
        terms.append(Term("vLLM: sampling during the update", 0, max(prefill, drawing)))
    return terms


def _token_bytes(layer: Layer, hidden: int, size: int) -> int:
    """Return the most bytes that a layer's forward needs for a token, without keys and values.

    They are: the residual stream, its normed copy and the output; and either gate, up and their
    product, or queries, keys, values and attention's output.
    """
    width, chosen = layer.width, layer.chosen
    mlp = chosen * (max(2 * width, hidden) + width) if chosen else 3 * width
    attention = 2 * layer.queries + 2 * layer.keys
    return (3 * hidden + max(mlp, attention) + layer.ranks) * size


def _sampling_bytes(shape: ModelShape, sampling: Sampling, rows: int) -> int:
    """Return the bytes of sampling ``rows`` tokens.

    In float32: logits, log-probs, probabilities and exponential noise; top-p and top-k also sort.
    An adapted head's B is copied to float32.
    """
    cut = sampling.rollout.top_p < 1 or sampling.rollout.top_k
    return (32 if cut else 16) * rows * shape.vocabulary + 4 * shape.vocabulary * shape.head_rank


def completion_bytes(shape: ModelShape, kv_cache: str, context: int, size: int) -> int:
    """Return the bytes of the key-value cache that one longest completion needs.

    Args:
        shape: the model's.
        kv_cache: type of the cache: auto (the compute type), fp8, fp8_per_token_head.
        context: tokens of the completion with its prompt.
        size: bytes of an element of the compute type.
    """
    tokens = (-(-context // BLOCK) + 1) * BLOCK  # one block is reserved by vLLM
    if kv_cache == "auto":
        return shape.kv_width * tokens * size
    scales = sum(2 * layer.key_heads for layer in shape.layers)
    per_token = kv_cache == "fp8_per_token_head"
    return tokens * (shape.kv_width + (4 * scales if per_token else 0))


VLLM_MEMORY = EngineMemory(
    "vllm",
    "vLLM",
    MOST_SEQUENCES,
    vllm_terms,
    shares_weights=True,
    completion_bytes=completion_bytes,
)
