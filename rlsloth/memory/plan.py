"""What fits a GPU, decided before anything is loaded: sizes of tensors, by phase.

Weights, adapters, optimizer states and key-value slots are counted exactly. Activations are an
estimate (memory/activations.py): on a CPU it is within ACTIVATION_TOLERANCE of the measured peak,
token by token. What attention and matrix libraries take inside on a GPU was not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from rlsloth.config import GrpoConfig
from rlsloth.kernels.linear_logprob.op import most_rows
from rlsloth.kernels.nf4.ahead import BUFFERS
from rlsloth.memory.activations import Stream, layer_memory, prefill_memory
from rlsloth.memory.shape import ModelShape, Weight

GIB = 2**30
ACTIVATION_TOLERANCE = 0.12
"""Of the estimate, found on a CPU for nine families (tests/test_plan.py)."""
CONTEXT = int(0.6 * GIB)
"""CUDA context, loaded kernels and cuBLAS workspaces: an allowance, outside what torch counts."""
PREFILL_TOKENS = 8192
"""rollout.transformers_engine.PREFILL_TOKENS: padded prompt tokens of one prefill."""
COLUMNS = 128
"""rollout.decode.COLUMNS: the length of a graphed cache is a multiple of it."""
NF4_ROWS = 256
"""kernels.lora.op.DECODED_ROWS: more rows decode on dequantised matrices."""

Precision = Literal["nf4", "bf16", "fp32"]
Phase = Literal["rollout", "update"]


@dataclass(frozen=True, slots=True)
class Term:
    """One row of the table; bytes in each phase, 0 where it is not held then."""

    name: str
    rollout: int
    update: int
    moment: bool = False
    """Of these a phase holds only the largest at a time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of a run on one GPU."""

    terms: tuple[Term, ...]
    total: int
    """Bytes of the GPU."""

    def peak(self, phase: Phase) -> int:
        """Bytes at the phase's fullest moment."""
        sizes = [(t.update if phase == "update" else t.rollout, t.moment) for t in self.terms]
        held = sum(size for size, moment in sizes if not moment)
        return held + max((size for size, moment in sizes if moment), default=0)

    @property
    def left(self) -> int:
        """Bytes free at the fullest moment of all; negative where it does not fit."""
        return self.total - max(self.peak("rollout"), self.peak("update"))

    @property
    def fits(self) -> bool:
        """Whether both phases do."""
        return self.left >= 0


def make_plan(shape: ModelShape, cfg: GrpoConfig, longest_prompt: int, total: int) -> Plan:
    """The plan of a run on a GPU of ``total`` bytes whose prompts have ``longest_prompt`` tokens at
    most."""
    precision: Precision = "bf16" if cfg.model.precision == "auto" else cfg.model.precision
    terms = [*_static(shape, cfg, precision), *_engine(shape, cfg, precision, longest_prompt)]
    terms += [*_activations(shape, cfg, precision, longest_prompt)]
    return Plan((*terms, Term("CUDA context, kernels (allowance)", CONTEXT, CONTEXT)), total)


def largest_tokens(plan: Callable[[GrpoConfig], Plan], cfg: GrpoConfig, least: int) -> int:
    """The largest ``tokens_per_microbatch`` that fits, 0 where ``least`` does not."""
    return _largest(
        lambda tokens: plan(cfg.model_copy(update={"tokens_per_microbatch": tokens})).fits, least
    )


def largest_sequences(plan: Callable[[GrpoConfig], Plan], cfg: GrpoConfig) -> int:
    """The largest ``rollout.max_sequences`` that fits, 0 where 1 does not; at most what a step or
    an evaluation asks for at once."""

    def fits(rows: int) -> bool:
        rollout = cfg.rollout.model_copy(update={"max_sequences": rows})
        return plan(cfg.model_copy(update={"rollout": rollout})).fits

    return min(_largest(fits, 1), asked_sequences(cfg))


def asked_sequences(cfg: GrpoConfig) -> int:
    """Completions wanted at once by a step or an evaluation, whichever wants more."""
    evaluates = cfg.eval.at_start or cfg.eval.every or cfg.eval.at_end
    evaluation = cfg.eval.problems * cfg.eval.samples if evaluates else 0
    return max(cfg.prompts_per_step * cfg.group_size, evaluation)


def _largest(fits: Callable[[int], bool], least: int, most: int = 1 << 20) -> int:
    """The largest number from ``least`` to ``most`` that fits: what it needs grows with it."""
    if not fits(least):
        return 0
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# --- what is always there ------------------------------------------------------------------------


def weight_bytes(weight: Weight, precision: Precision) -> int:
    """A parameter of the base as policy.load loads it."""
    if precision == "nf4" and weight.quantised:
        return nf4_bytes(weight.count)
    return weight.count * _size(precision)


def nf4_bytes(count: int) -> int:
    """Of bitsandbytes' NF4 with double quantisation: two codes a byte; for each 64 weights an 8-bit
    scale; for each 256 scales a float32 one; the tables of 16 and 256 float32, and an offset."""
    scales = -(-count // 64)
    return -(-count // 2) + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)


def optimizer_bytes(trained: tuple[int, ...], name: str) -> int:
    """States of policy.optimizer on a GPU. AdamW: two float32 moments and a step count a tensor.
    8-bit: bytes, and two float32 for each 256; tensors under 4096 elements keep float32."""
    if name == "adamw":
        return sum(8 * n + 4 for n in trained)
    tables = 2 * 256 * 4 if any(n >= 4096 for n in trained) else 0
    return tables + sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in trained)


def _size(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2


def _static(shape: ModelShape, cfg: GrpoConfig, precision: Precision) -> list[Term]:
    terms = []
    kept = {True: "NF4 + double quantisation", False: "fp32" if precision == "fp32" else "bf16"}
    sizes: dict[str, int] = {}
    for weight in shape.weights:
        label = kept[precision == "nf4" and weight.quantised]
        name = f"base: {weight.group}, {label}"
        sizes[name] = sizes.get(name, 0) + weight_bytes(weight, precision)
    terms += [Term(name, size, size) for name, size in sizes.items()]
    # PEFT keeps adapters in float32, policy.lora.add_adapter.
    adapters = 4 * (sum(shape.trained) + shape.reference)
    terms.append(Term("LoRA: weights, fp32", adapters, adapters))
    terms.append(Term("LoRA: gradients, fp32", 0, 4 * sum(shape.trained)))
    name = "adamw_8bit" if cfg.optim.name == "auto" else cfg.optim.name
    states = optimizer_bytes(shape.trained, name)
    terms.append(Term(f"LoRA: optimizer states, {name}", states, states))
    if precision == "nf4":
        # nf4.ahead shares three; bitsandbytes' own products make one at a time.
        count = BUFFERS if any(layer.on_kernels for layer in shape.layers) else 1
        buffers = count * shape.largest_matrix * 2
        terms.append(Term(f"dequantised matrices, {count} of the largest", buffers, buffers))
    return terms


# --- the embedded engine -------------------------------------------------------------------------


def cache_shape(cfg: GrpoConfig, context: int, longest_prompt: int) -> tuple[int, int]:
    """Rows and tokens of the engine's slots (rollout.decode.Decoder.cache)."""
    rows = min(cfg.rollout.max_sequences, asked_sequences(cfg))
    tokens = max(cfg.rollout.max_tokens, cfg.eval.max_tokens or 0)
    length = min(longest_prompt + tokens, context)
    if cfg.rollout.cuda_graphs:
        rows, length = 1 << (rows - 1).bit_length(), -(-length // COLUMNS) * COLUMNS
    return rows, length


def kv_bytes(shape: ModelShape, rows: int, length: int, size: int) -> int:
    """A key and a value for each slot, layer and key head (rollout.slot_cache.SlotCache)."""
    return sum(2 * layer.keys for layer in shape.layers) * rows * length * size


def _engine(
    shape: ModelShape, cfg: GrpoConfig, precision: Precision, longest_prompt: int
) -> list[Term]:
    """The engine that samples with the trained model itself; another engine has terms of its
    own."""
    size = _size(precision)
    rows, length = cache_shape(cfg, _context(shape, cfg), longest_prompt)
    slots = kv_bytes(shape, rows, length, size)
    logits = 4 * rows * shape.vocabulary
    # A step's activations, of which decoding attention writes scores out in float32: raw, scaled,
    # masked, softmax and the softmax rounded. They stay reserved in the pool of the graphs.
    layers = shape.layers
    step = max(prefill_memory(layer, shape.hidden, size) for layer in layers)
    step += max(layer.heads for layer in layers) * length * (16 + size)
    pool = int(rows * step)
    if precision == "nf4" and rows > NF4_ROWS:
        pool += 2 * shape.largest_matrix * 2
    graphed = cfg.rollout.cuda_graphs
    kept = "kept between steps" if graphed else "freed after sampling"
    terms = [
        Term(f"key-value slots {rows} x {length}, {kept}", slots, slots if graphed else 0),
        Term("logits, decoding step", logits + pool, logits + pool if graphed else 0),
    ]
    tokens = max(min(PREFILL_TOKENS, cfg.prompts_per_step * longest_prompt), longest_prompt)
    widest = max(prefill_memory(layer, shape.hidden, size) for layer in layers)
    prefill = tokens * (widest + sum(2 * layer.keys for layer in layers) * size)
    # rollout.sampling.draw: sums, their running maximum and its int64 places; top-p also sorts.
    drawing = (16 if cfg.rollout.top_p >= 1 else 32) * rows * shape.vocabulary
    return [
        *terms,
        Term(f"prefill of {tokens} tokens (estimate)", int(prefill), 0, moment=True),
        Term("sampling", drawing, 0, moment=True),
    ]


def _context(shape: ModelShape, cfg: GrpoConfig) -> int:
    return min(cfg.model.max_context or shape.context, shape.context)


# --- the update ----------------------------------------------------------------------------------


def stream_of(cfg: GrpoConfig, longest_prompt: int) -> Stream:
    """What a micro-batch is taken to hold: the longest prompt, completions of half the limit (short
    ones repeat the prompt in attention more often) and as many of a group as fit."""
    completion = max(1, cfg.rollout.max_tokens // 2)
    room = max(1, (cfg.tokens_per_microbatch - longest_prompt) // completion)
    return Stream(longest_prompt, completion, min(cfg.group_size, room))


def _activations(
    shape: ModelShape, cfg: GrpoConfig, precision: Precision, longest_prompt: int
) -> list[Term]:
    size, tokens = _size(precision), cfg.tokens_per_microbatch
    stream = stream_of(cfg, longest_prompt)
    layers = [layer_memory(layer, shape.hidden, size, stream) for layer in shape.layers]
    # Each layer's input; under checkpointing that is all, and a layer's own is made again.
    inputs = len(layers) * shape.hidden * size
    if cfg.model.gradient_checkpointing:
        kept, work = float(inputs), max(layer.at_work for layer in layers)
        name = "activations: layer inputs (checkpointing)"
    else:
        kept = inputs + sum(layer.kept for layer in layers)
        work = max(layer.at_work - layer.kept for layer in layers)
        name = "activations: all layers (no checkpointing)"
    at_work = tokens * work + max(layer.fixed for layer in layers)
    return [
        Term(f"{name} (estimate)", 0, int(tokens * kept)),
        Term("activations: one layer's backward (estimate)", 0, int(at_work), moment=True),
        Term("linear_logprob", 0, head_bytes(shape, tokens, precision), moment=True),
    ]


def head_bytes(shape: ModelShape, tokens: int, precision: Precision) -> int:
    """linear_logprob where every token is scored, the hidden states before it included."""
    size, fused = _size(precision), precision != "fp32"
    rows = min(tokens, most_rows(shape.vocabulary, torch.device("cuda"), fused))
    # The decoder's output and the scored copy, over which the gradient is written.
    hidden = 2 * tokens * shape.hidden * size
    # odds.chunks: odds in the compute type, or float32 logits and odds; then their product with the
    # head in float32, and the normed rows.
    chunk = rows * (shape.vocabulary * (size if fused else 8) + shape.hidden * (4 + size))
    if shape.head_rank:
        # An adapted head is copied whole with its adapter; the hidden states are, too.
        copied = (shape.vocabulary + tokens) * (shape.hidden + shape.head_rank) * size
        hidden += copied + 4 * shape.vocabulary * shape.head_rank + tokens * shape.hidden * size
    return hidden + chunk
