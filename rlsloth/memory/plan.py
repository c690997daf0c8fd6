"""What fits a GPU, decided before anything is loaded: sizes of tensors, by phase.

Weights, adapters, optimizer states and key-value slots are counted exactly. Activations are an
estimate (memory/activations.py): on a CPU it is within ACTIVATION_TOLERANCE of the measured peak,
token by token. What attention and matrix libraries take inside on a GPU was not measured.

vLLM's key-value cache is as large as the plan says. Only it is freed for the update and taken back
for rollouts; what is needed beside it is counted first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from rlsloth.config import MICROBATCH, GrpoConfig
from rlsloth.kernels.linear_logprob.op import most_rows
from rlsloth.kernels.lora.layer import ALIGNMENT
from rlsloth.kernels.nf4.ahead import BUFFERS
from rlsloth.memory.activations import Stream, layer_memory
from rlsloth.memory.shape import ModelShape, Weight
from rlsloth.memory.terms import GIB, EngineName, Phase, Plan, Precision, Term, element_size
from rlsloth.memory.workload import asked_sequences, longest_sequence, sequences_at_once
from rlsloth.rollout.embedded.memory import transformers_terms
from rlsloth.rollout.vllm.memory import completion_bytes, fit_cache, vllm_terms

ACTIVATION_TOLERANCE = 0.12
"""Of the estimate, found on a CPU for nine families (tests/test_plan.py)."""
MICROBATCHES = range(16384, 0, -512)
"""Tokens to choose from."""
WORTH_KEEPING = 4096
"""Tokens from which layers are kept rather than made again: with fewer, a prompt is computed for
fewer of its completions at once, and the base dequantised for fewer tokens."""
KEPT_FREE = 0.1
"""Share of a GPU that the choice leaves to errors of the estimate and to fragmentation."""
CONTEXT = int(0.6 * GIB)
"""CUDA context, loaded kernels and cuBLAS workspaces: an allowance, outside what torch counts."""
SPARE = 32
"""One part in so many of a GPU is not given to vLLM's cache: allocators lose some to gaps."""
SMALL_CACHE = 20
"""A cache of at most one part in so many of a GPU stays for the update where both find room. To
give one back and take it again costs 30 ms a step, and torch the memory that it has at hand."""


def make_plan(
    shape: ModelShape,
    cfg: GrpoConfig,
    engine: EngineName,
    longest_prompt: int,
    total: int,
    *,
    context: int | None = None,
    free: int | None = None,
) -> Plan:
    """The plan of a run on a GPU of ``total`` bytes.

    Args:
        engine: the one that samples.
        longest_prompt: its tokens.
        context: tokens of the longest prompt and completion that vLLM is started for; default: by
            the configuration.
        free: bytes of the GPU that are free once the model is loaded, for vLLM's cache; default: as
            planned.
    """
    precision = precision_of(cfg)
    context = context or longest_sequence(shape, cfg, longest_prompt)
    terms = _static(shape, cfg, precision)
    if engine == "vllm":
        terms += vllm_terms(shape, cfg, precision, context)
    else:
        terms += transformers_terms(shape, cfg, precision, longest_prompt)
    terms += _activations(shape, cfg, precision, stream_of(cfg, longest_prompt))
    terms.append(_context())
    if engine == "transformers":
        return Plan(engine, tuple(terms), total)
    # Nothing but this is left free where the cache takes all the room that there is.
    spare = total // SPARE
    terms.append(
        Term("vLLM: allocators' gaps (allowance)", spare, spare if cfg.rollout.overlap else 0)
    )
    plan = Plan(engine, tuple(terms), total)
    one = completion_bytes(shape, cfg.rollout.kv_cache, context, element_size(precision))
    return _with_cache(plan, one, cfg, context, free)


def make_update_plan(shape: ModelShape, cfg: GrpoConfig, stream: Stream, total: int) -> Plan:
    """The plan of a run that samples nothing, on a GPU of ``total`` bytes; ``stream``: what its
    micro-batches are made of."""
    precision = precision_of(cfg)
    terms = [*_static(shape, cfg, precision), *_activations(shape, cfg, precision, stream)]
    return Plan(None, (*terms, _context()), total)


def precision_of(cfg: GrpoConfig) -> Precision:
    """Of the weights on a GPU."""
    return "bf16" if cfg.model.precision == "auto" else cfg.model.precision


def _context() -> Term:
    return Term("CUDA context, kernels (allowance)", CONTEXT, CONTEXT, loaded=True)


def _with_cache(plan: Plan, one: int, cfg: GrpoConfig, context: int, free: int | None) -> Plan:
    """vLLM's cache takes what the phases leave in which it is held. A small one is held in both."""
    phases: tuple[Phase, ...] = ("rollout", "update") if cfg.rollout.overlap else ("rollout",)
    room = min(plan.total - plan.peak(phase) for phase in phases)
    if free is not None:
        room = min(room, *(free - plan.peak(phase, to_come=True) for phase in phases))
    cache = fit_cache(one, sequences_at_once(cfg), context, room)
    left = plan.total - plan.peak("update")
    if free is not None:
        left = min(left, free - plan.peak("update", to_come=True))
    beside = cache.size + KEPT_FREE * plan.total <= left
    stays = cfg.rollout.overlap or (beside and SMALL_CACHE * cache.size <= plan.total)
    name = f"vLLM: key-value cache, {max(1, cache.holds)} x {context}"
    term = Term(name, cache.size, cache.size if stays else 0)
    return replace(plan, terms=(*plan.terms, term), cache=replace(cache, stays=stays))


def largest_tokens(plan: Callable[[GrpoConfig], Plan], cfg: GrpoConfig, least: int) -> int:
    """The largest ``tokens_per_microbatch`` that fits, 0 where ``least`` does not."""
    return _largest(
        lambda tokens: plan(cfg.model_copy(update={"tokens_per_microbatch": tokens})).fits, least
    )


def decide_update(plan: Callable[[GrpoConfig], Plan], cfg: GrpoConfig, least: int) -> GrpoConfig:
    """The configuration with ``tokens_per_microbatch`` and ``model.gradient_checkpointing`` decided
    where it leaves them open: an update that leaves a share KEPT_FREE of the GPU, without
    checkpointing rather than with it, with the largest of MICROBATCHES rather than a smaller one;
    ``least`` tokens, checkpointed, where none does."""
    named, auto = cfg.tokens_per_microbatch, cfg.model.gradient_checkpointing == "auto"

    def having(tokens: int, checkpointing: bool) -> GrpoConfig:
        model = cfg.model.model_copy(update={"gradient_checkpointing": checkpointing})
        tokens = named or max(tokens, least)
        return cfg.model_copy(update={"model": model, "tokens_per_microbatch": tokens})

    checkpointing = bool(cfg.model.gradient_checkpointing)
    if cfg.rollout.overlap:  # vLLM's cache then takes whatever an update leaves
        return having(MICROBATCH, checkpointing)
    choices = [having(tokens, checkpointing) for tokens in MICROBATCHES]
    if auto:
        choices = [having(n, False) for n in MICROBATCHES if n >= WORTH_KEEPING] + choices
    for choice in choices:
        made = plan(choice)
        if made.peak("update") <= (1 - KEPT_FREE) * made.total:
            return choice
    return having(least, checkpointing)


def largest_sequences(plan: Callable[[GrpoConfig], Plan], cfg: GrpoConfig) -> int:
    """The largest ``rollout.max_sequences`` that fits, 0 where 1 does not; at most what a step or
    an evaluation asks for at once."""

    def fits(rows: int) -> bool:
        rollout = cfg.rollout.model_copy(update={"max_sequences": rows})
        return plan(cfg.model_copy(update={"rollout": rollout})).fits

    return min(_largest(fits, 1), asked_sequences(cfg))


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
    return weight.count * element_size(precision)


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


def _static(shape: ModelShape, cfg: GrpoConfig, precision: Precision) -> list[Term]:
    terms: list[Term] = []
    kept = {True: "NF4 + double quantisation", False: "fp32" if precision == "fp32" else "bf16"}
    sizes: dict[str, int] = {}
    for weight in shape.weights:
        label = kept[precision == "nf4" and weight.quantised]
        name = f"base: {weight.group}, {label}"
        sizes[name] = sizes.get(name, 0) + weight_bytes(weight, precision)
    terms += [Term(name, size, size, loaded=True) for name, size in sizes.items()]
    # PEFT keeps adapters in float32, policy.lora.add_adapter.
    adapters = 4 * (sum(shape.trained) + shape.reference)
    terms.append(Term("LoRA: weights, fp32", adapters, adapters, loaded=True))
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


# --- the update ----------------------------------------------------------------------------------


def stream_of(cfg: GrpoConfig, longest_prompt: int) -> Stream:
    """What a micro-batch is taken to hold: the longest prompt, completions of half the limit (short
    ones repeat the prompt in attention more often) and as many of a group as fit."""
    completion = max(1, cfg.rollout.max_tokens // 2)
    room = max(1, (cfg.microbatch - longest_prompt) // completion)
    return Stream(longest_prompt, completion, min(cfg.group_size, room))


def _activations(
    shape: ModelShape, cfg: GrpoConfig, precision: Precision, stream: Stream
) -> list[Term]:
    size, tokens = element_size(precision), cfg.microbatch
    layers = [layer_memory(layer, shape.hidden, size, stream) for layer in shape.layers]
    # Each layer's input; under checkpointing that is all, and a layer's own is made again.
    inputs = len(layers) * shape.hidden * size
    if cfg.model.gradient_checkpointing:
        kept, work, copies = float(inputs), max(layer.at_work for layer in layers), 0
        name = "activations: layer inputs (checkpointing)"
    else:
        kept = inputs + sum(layer.kept for layer in layers)
        work = max(layer.at_work - layer.kept for layer in layers)
        # lora.autograd.Adapters, lora.mlp.Parts
        rank = cfg.lora.rank
        padded = (rank + -rank % ALIGNMENT) / rank
        on_kernels = shape.layers[0].on_kernels
        copies = int(size * sum(shape.trained) * padded) if on_kernels else 0
        name = "activations: all layers (no checkpointing)"
    at_work = tokens * work + max(layer.fixed for layer in layers)
    return [
        Term(f"{name} (estimate)", 0, int(tokens * kept) + copies),
        Term("activations: one layer's backward (estimate)", 0, int(at_work), moment=True),
        Term("linear_logprob", 0, head_bytes(shape, tokens, precision), moment=True),
    ]


def head_bytes(shape: ModelShape, tokens: int, precision: Precision) -> int:
    """linear_logprob where every token is scored, the hidden states before it included."""
    size, fused = element_size(precision), precision != "fp32"
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
