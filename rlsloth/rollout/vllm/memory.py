"""Memory of vLLM on the trainer's base weights, and the size of its key-value cache."""

from __future__ import annotations

from rlsloth.kernels.nf4.op import MAX_ROWS
from rlsloth.memory.shape import Layer, ModelShape
from rlsloth.memory.terms import GIB, Precision, Term, element_size
from rlsloth.memory.workload import EngineMemory, Sampling

BLOCK = 32
"""Tokens of a block of keys and values, or a multiple of it (rollout.vllm.start.BLOCK)."""
BATCHED_TOKENS = 8192
"""rollout.vllm.start.BATCHED_TOKENS: prompt tokens computed at once."""
SPLITS = 32
"""Parts of a sequence, at most, that graphed decoding attends to apart: vLLM's
``flash_attn_max_num_splits_for_cuda_graph``. Only flash-attention 3 (Hopper) makes them."""
ALLOWANCE = int(0.6 * GIB)
"""CUDA graphs, workspaces and the kernels loaded with them. With the other terms that are there
after vLLM's start this makes 0.96 GiB for 8 layers of an 8B model and 512 sequences, where
examples/benchmarks/rollout_speed.py found 0.98 on an H100."""


def vllm_terms(
    shape: ModelShape, sampling: Sampling, precision: Precision, context: int
) -> list[Term]:
    """Memory of vLLM without its key-value cache. ``context``: tokens of the longest prompt and
    completion."""
    size, rows = element_size(precision), sampling.at_once
    experts = size * sum(weight.count for weight in shape.weights if weight.group == "experts")
    slots = size * sum(linear.rank * (linear.into + linear.out) for linear in shape.fused)
    # For more rows than its product decodes by itself; graphs keep one in a pool of their own.
    quantised = [f for f in shape.fused if precision == "nf4" and f.quantised]
    matrix = size * max((f.out * f.into for f in quantised), default=0)
    token = max(_token_bytes(layer, shape.hidden, size) for layer in shape.layers)
    # Attention's partial results are float32.
    splits = 4 * SPLITS * max(layer.queries for layer in shape.layers)
    graphs = ALLOWANCE + rows * (token + splits) + (matrix if rows > MAX_ROWS else 0)
    tokens = min(max(BATCHED_TOKENS, rows), rows * context)
    prefill, drawing = tokens * token + matrix, _sampling_bytes(shape, sampling, rows)
    terms = []
    if experts:  # not bound to the trainer's (rollout.vllm.weights.SharedConfig)
        terms.append(Term("vLLM: its own copy of the experts", experts, experts))
    terms.append(Term("vLLM: its copy of the adapter", slots, slots))
    terms += [
        Term("vLLM: CUDA graphs, workspaces (allowance)", graphs, graphs),
        Term(f"vLLM: prefill of {tokens} tokens (estimate)", prefill, 0, moment=True),
        Term("vLLM: logits, sampling", drawing, 0, moment=True),
    ]
    if sampling.rollout.overlap:
        terms.append(Term("vLLM: sampling beside the update", 0, max(prefill, drawing)))
    return terms


def _token_bytes(layer: Layer, hidden: int, size: int) -> int:
    """The most that a layer's forward holds for a token, keys and values aside: the residual
    stream, what is normed and what comes out; gate beside up and their product, or queries, keys,
    values and what is attended to."""
    width, chosen = layer.width, layer.chosen
    mlp = chosen * (max(2 * width, hidden) + width) if chosen else 3 * width
    attention = 2 * layer.queries + 2 * layer.keys
    return (3 * hidden + max(mlp, attention) + layer.ranks) * size


def _sampling_bytes(shape: ModelShape, sampling: Sampling, rows: int) -> int:
    """In float32: logits, log-probs, probabilities, exponential noise; top-p and top-k also sort.
    An adapted head's B is copied to float32."""
    cut = sampling.rollout.top_p < 1 or sampling.rollout.top_k
    return (32 if cut else 16) * rows * shape.vocabulary + 4 * shape.vocabulary * shape.head_rank


def completion_bytes(shape: ModelShape, kv_cache: str, context: int, size: int) -> int:
    """Keys and values of the longest completion with its prompt; ``size``: bytes an element of the
    compute type."""
    tokens = (-(-context // BLOCK) + 1) * BLOCK  # one block is vLLM's own
    if kv_cache == "auto":
        return shape.kv_width * tokens * size
    scales = sum(2 * layer.key_heads for layer in shape.layers)
    per_token = kv_cache == "fp8_per_token_head"
    return tokens * (shape.kv_width + (4 * scales if per_token else 0))


VLLM_MEMORY = EngineMemory("vllm", "vLLM", vllm_terms, completion_bytes)
