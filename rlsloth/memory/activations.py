"""Memory of activations in the packed update and in prefill, in bytes a token, layer by layer.

The formulas follow the code: each term names the tensors that it counts. Tests compare them with
the measured peak of small models on a CPU, where replacements of the Triton kernels allocate the
same tensors. Workspaces inside a GPU's attention and matrix libraries are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from rlsloth.kernels.adapted_glu.op import CHUNK_ROWS, FUSED_RANK
from rlsloth.memory.shape import Layer
from rlsloth.policy.activations.placement import Placement
from rlsloth.policy.attention.backend import Widths
from rlsloth.policy.attention.backends import BACKENDS
from rlsloth.policy.attention.layout import TREE_LIMIT
from rlsloth.policy.attention.plain import BLOCK_ROWS


@dataclass(frozen=True, slots=True)
class Stream:
    """The assumed composition of a micro-batch: trees of one prompt with its completions."""

    prompt: int
    """Number of tokens of each prompt."""
    completion: int
    """Number of tokens of each completion."""
    group: int
    """Number of completions that share a prompt."""

    @property
    def repeats(self) -> float:
        """Number of tokens that attention sees for each token of the stream.

        A prompt counts once for itself and once for each completion (PackedLayout.lengths), unless
        it has one only: they are one sequence then (data.packing).
        """
        if self.group == 1:
            return 1.0
        tree = self.prompt + self.group * self.completion
        return (tree + self.group * self.prompt) / tree


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """The memory of one layer's activations, without the layer's input."""

    kept: float
    """Bytes a token that autograd keeps from the layer's forward to its backward."""
    moments: tuple[tuple[float, float], ...]
    """The MLP's and attention's backward: bytes a token, and bytes for any number of tokens.

    The former include ``kept`` and its gradient.
    """

    def at_work(self, tokens: int) -> float:
        """Return the bytes at the peak of the layer's backward, including ``kept``."""
        return max(tokens * each + fixed for each, fixed in self.moments)


@cache
def layer_memory(
    layer: Layer,
    hidden: int,
    size: int,
    stream: Stream,
    backend: str = "sdpa",
    placement: Placement | None = None,
    tokens: int | None = None,
) -> LayerMemory:
    """Estimate the memory of one layer in training.

    Args:
        layer: the layer's widths.
        hidden: hidden size of the model.
        size: bytes of an element of the compute type.
        stream: composition of a micro-batch.
        backend: name of the attention backend.
        placement: how the layer is computed, if it is computed again.
        tokens: number of tokens of the micro-batch, which may be shorter than a tile.
    """
    placement = placement or Placement()
    kept, work, fixed = _attention(layer, size, stream, backend, placement.attention_parts)
    mlp_kept, mlp_work = _mlp(layer, hidden, size)
    mlp_fixed = 0.0
    if placement.mlp_rows is not None and tiles_mlp(layer):
        # Gate, up, their product or its gradient, and the product's sums, of one tile; all tiles
        # are alike in size (kernels/lora/mlp_tiles.py).
        mlp_kept = mlp_work = 0.0
        rows = placement.mlp_rows
        rows = rows if tokens is None else -(-tokens // -(-tokens // rows))
        mlp_fixed = 4.0 * layer.width * size * rows
    around_kept, around_work = _around(layer, hidden, size)
    kept += mlp_kept + around_kept
    fused = size < 4 and layer.rank <= FUSED_RANK
    if layer.on_kernels and layer.rank and not layer.chosen and not fused:
        # Chunks of gate, of up, and of their product's gradient, with adapters added.
        mlp_fixed = max(mlp_fixed, 3.0 * layer.width * size * CHUNK_ROWS)
    # The MLP's part is freed before attention's backward begins.
    return LayerMemory(
        kept,
        (
            (kept + mlp_work + around_work, mlp_fixed),
            (kept - mlp_kept + work + around_work, fixed),
        ),
    )


def tiles_mlp(layer: Layer) -> bool:
    """Tell whether the layer's MLP can be computed in tiles (kernels/lora/mlp_tiles.py)."""
    return layer.on_kernels and not layer.chosen and not layer.fused_mlp


def attention_results(layer: Layer, size: int) -> tuple[int, int]:
    """Return the bytes a token of attention's output, and of its log-sums."""
    return layer.queries * size, 4 * layer.heads


def _around(layer: Layer, hidden: int, size: int) -> tuple[float, float]:
    """Estimate norms, residuals and adapters: bytes a token kept, and further ones in backward."""
    # rms_norm keeps its input, which is the layer's input or the sum after attention. The linear
    # layers after the norms keep the norms' outputs.
    kept = 3 * hidden * size + layer.ranks * size
    if layer.sandwich:  # two further norms keep their inputs
        kept += 2 * hidden * size
    if not layer.on_kernels:
        # PEFT's adapted layers make float32 copies of their inputs.
        kept += layer.adapted_inputs * (4 if size < 4 else 0)
    if not (layer.on_kernels or layer.norms_on_kernels):
        # So do transformers' norms; in float32 autograd keeps the normed rows before the weight.
        kept += 2 * hidden * 4
    # PEFT's DoRA keeps the base layer's result, and the adapter's in float32.
    kept += layer.dora_outputs * (size + 4)
    return kept, 2 * hidden * size  # the gradients of a layer's output and of a part's input


def _attention(
    layer: Layer, size: int, stream: Stream, backend: str, parts: int
) -> tuple[float, float, float]:
    """Estimate attention: bytes a token kept, further ones in backward, and constant bytes."""
    q, k = layer.queries, layer.keys
    normed = (q + k) * size if layer.normed else 0  # those norms keep their inputs
    longest = stream.prompt + stream.completion
    if not (layer.scores or (layer.window and longest > layer.window)):
        name = backend if size < 4 else "sdpa"
        found = BACKENDS[name].memory(Widths(q, k, layer.heads, stream.repeats, size))
        parts = math.gcd(parts, layer.key_heads)
        buffers = found.buffers / parts
        if parts > 1:  # the gradients of a part, before they are copied into the whole
            buffers += (q + 2 * k) * size / parts
        return normed + found.kept, found.work + buffers, 0.0
    kept = float(q * size + normed)  # the output, which the output projection keeps
    # The gradients of the output, of queries, keys and values, and the one that is being added.
    work = float(q + (q + 2 * k) + q) * size
    # plain_attention: queries and keys in float32, and values; of the scores, in float32, the
    # softmax, and a rounded or contiguous copy, or a softcap's tanh.
    tree = stream.prompt + stream.group * stream.completion
    copied = 4 * (q + k) + size * k
    scores = (8.0 if size == 4 else 6.0 + 4.0 * layer.scores) * layer.heads
    gradient = 4.0 * layer.heads
    if tree <= TREE_LIMIT:
        return kept + copied + scores * tree, work + gradient * tree, 0.0
    # Longer trees are computed sequence by sequence, in blocks of rows that the backward pass
    # recomputes; copies from the stream are kept.
    kept += stream.repeats * (q + 2 * k) * size
    block = (scores + gradient) * min(BLOCK_ROWS, longest) * longest
    return kept, work, block + 2 * copied * longest


def _mlp(layer: Layer, hidden: int, size: int) -> tuple[float, float]:
    """Estimate the MLP: bytes a token kept, and further ones in backward."""
    width, chosen = layer.width, layer.chosen
    if chosen:
        # grouped_mm_experts_forward keeps gate and up, their product's factors, and the output that
        # the router weighs, for each chosen expert; backward has the gradients of all of these.
        return chosen * (4 * width + hidden) * size, chosen * (4 * width + 2 * hidden) * size
    if not layer.on_kernels:
        # The activation and the product keep gate, act(gate) and up. Backward has gradients of
        # down's input in the compute type, for an adapter in float32, too, and the product's two.
        return 3 * width * size, width * (2 * size + (4 if size < 4 and layer.rank else 0))
    if layer.fused_mlp:
        # The outputs of lora_linear (gate, up) and of the gated unit, kept by down; 3 gradients.
        return 3 * width * size, 3 * width * size
    # The kernel (lora.mlp.InnerFunction) keeps gate and up, and works on one more; the gradient of
    # x is counted with the layer's.
    return 2 * width * size, width * size


def prefill_memory(layer: Layer, hidden: int, size: int) -> float:
    """Estimate a layer's forward without gradients, in bytes a token, without keys and values.

    Args:
        layer: the layer's widths.
        hidden: hidden size of the model.
        size: bytes of an element of the compute type.
    """
    # The layer's input, the sum after attention, two norms' outputs and the layer's output; gate,
    # up and their product.
    wide = layer.chosen * (4 * layer.width + 2 * hidden) if layer.chosen else 3 * layer.width
    attended = 2 * layer.queries + 2 * layer.keys
    copies = 1 if layer.on_kernels else 2  # norms and adapted layers make float32 copies
    return (5 * hidden + max(wide + layer.ranks, attended)) * size * copies
