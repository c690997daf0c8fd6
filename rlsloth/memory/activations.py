"""Activations of the packed update and of prefill, in bytes a token, layer by layer.

Counted from the code as it stands: each term names the tensors that it counts. Tests compare them
with the measured peak of small models on a CPU, where stand-ins for the Triton kernels allocate
what those do; what a GPU's attention and matrix libraries take inside is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlsloth.kernels.adapted_glu.op import CHUNK_ROWS, FUSED_RANK
from rlsloth.memory.shape import Layer
from rlsloth.policy.attention.layout import TREE_LIMIT
from rlsloth.policy.attention.plain import BLOCK_ROWS


@dataclass(frozen=True, slots=True)
class Stream:
    """What a micro-batch is made of: one prompt with its completions, again and again."""

    prompt: int
    """Tokens of a prompt."""
    completion: int
    """Tokens of a completion."""
    group: int
    """Completions that share a prompt in a micro-batch."""

    @property
    def repeats(self) -> float:
        """Tokens that attention sees for each one of the stream: a prompt counts once for each
        completion, and for itself (PackedLayout.sequences)."""
        tree = self.prompt + self.group * self.completion
        return (tree + self.group * self.prompt) / tree


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes a token, beyond the layer's input."""

    kept: float
    """What autograd holds from the layer's forward to its backward."""
    at_work: float
    """The most that the layer's backward holds, ``kept`` and the incoming gradient included."""
    fixed: float
    """The same for what does not grow with the stream: bytes."""


def layer_memory(layer: Layer, hidden: int, size: int, stream: Stream) -> LayerMemory:
    """Of one layer in training; ``size``: bytes an element of the compute type."""
    kept, work, fixed = _attention(layer, size, stream)
    mlp_kept, mlp_work = _mlp(layer, hidden, size)
    around_kept, around_work = _around(layer, hidden, size)
    kept += mlp_kept + around_kept
    fused = size < 4 and layer.rank <= FUSED_RANK
    if layer.on_kernels and not layer.chosen and not fused:
        # Chunks of gate, up and their product's gradient with their adapters added.
        fixed = max(fixed, 3.0 * layer.width * size * CHUNK_ROWS)
    # One after the other: the MLP's part is freed before attention's backward begins.
    return LayerMemory(kept, max(kept + mlp_work, kept - mlp_kept + work) + around_work, fixed)


def _around(layer: Layer, hidden: int, size: int) -> tuple[float, float]:
    """Norms, residuals and adapters: kept, and at work besides."""
    # rms_norm keeps its input: the layer's own, and the sum after attention. Both results are kept
    # by the linears behind them.
    kept = 3 * hidden * size + layer.ranks * size
    if layer.sandwich:  # two more norms keep their inputs
        kept += 2 * hidden * size
    if not layer.on_kernels:
        # transformers norms a float32 copy, and PEFT takes one of every adapted linear's input.
        kept += (2 * hidden + layer.adapted_inputs) * (4 if size < 4 else 0)
        # In float32 there is no copy, but the normed rows before the weight are kept by autograd.
        kept += 2 * hidden * (4 if size == 4 else 0)
    return kept, 2 * hidden * size  # the gradients of a layer's output and of a part's input


def _attention(layer: Layer, size: int, stream: Stream) -> tuple[float, float, float]:
    """Kept, at work besides, and bytes whatever the stream is."""
    q, k = layer.queries, layer.keys
    # The output, which the linear behind it keeps.
    kept = float(q * size)
    if layer.normed:  # the norms of queries and keys keep their inputs
        kept += (q + k) * size
    # The output's gradient, those of queries, keys and values summed over the sequences, and the
    # one that is being added (as wide as the stream, too).
    work = float(q + (q + 2 * k) + q) * size
    longest = stream.prompt + stream.completion
    if not (layer.scores or (layer.window and longest > layer.window)):
        # Each sequence's queries, keys, values and output, taken out of the stream
        # (packed_backends._causal_squares), and a float32 sum a head and row.
        return kept + stream.repeats * ((2 * q + 2 * k) * size + 4 * layer.heads), work, 0.0
    # attention._plain: queries and keys in float32, values; and of the scores, in float32, the
    # softmax, a rounded or contiguous copy, or a softcap's tanh.
    tree = stream.prompt + stream.group * stream.completion
    copied = 4 * (q + k) + size * k
    scores = (8.0 if size == 4 else 6.0 + 4.0 * layer.scores) * layer.heads
    gradient = 4.0 * layer.heads
    if tree <= TREE_LIMIT:
        return kept + copied + scores * tree, work + gradient * tree, 0.0
    # Longer trees go sequence by sequence, in blocks of rows made again in the backward pass: what
    # they take out of the stream is kept.
    kept += stream.repeats * (q + 2 * k) * size
    block = (scores + gradient) * min(BLOCK_ROWS, longest) * longest
    return kept, work, block + 2 * copied * longest


def _mlp(layer: Layer, hidden: int, size: int) -> tuple[float, float]:
    """Kept, and at work besides."""
    width, chosen = layer.width, layer.chosen
    if chosen:
        # grouped_mm_experts_forward: gate and up, their product's factors, and what the router
        # weighs, for every chosen expert; backward the gradients of all of these.
        return chosen * (4 * width + hidden) * size, chosen * (4 * width + 2 * hidden) * size
    if not layer.on_kernels:
        # The activation and the product keep gate, act(gate) and up. Backward: float32 and compute
        # type gradients of down's input, and the product's two.
        return 3 * width * size, width * (2 * size + (4 if size < 4 else 0))
    if layer.fused_mlp:
        # lora_linear's output (gate beside up), and the unit's, which down keeps; three gradients.
        return 3 * width * size, 3 * width * size
    # lora.mlp.InnerFunction keeps gate and up, and works on one more; the gradient of x is counted
    # with the layer's.
    return 2 * width * size, width * size


def prefill_memory(layer: Layer, hidden: int, size: int) -> float:
    """Bytes a token of a layer's forward without gradient, beyond the keys and values it leaves."""
    # The residual stream, its sum, two normed ones and the output; gate, up and their product.
    wide = layer.chosen * (4 * layer.width + 2 * hidden) if layer.chosen else 3 * layer.width
    attended = 2 * layer.queries + 2 * layer.keys
    copies = 1 if layer.on_kernels else 2  # float32 copies of what is normed or adapted
    return (5 * hidden + max(wide + layer.ranks, attended)) * size * copies
