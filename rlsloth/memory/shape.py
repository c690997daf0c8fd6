"""The sizes of a model that decide its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Group = Literal["linears", "experts", "embeddings", "head", "norms and biases"]


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of the base model; tied ones count once, as embeddings."""

    group: Group
    count: int
    """Number of elements."""
    quantised: bool
    """Whether ``--model.precision nf4`` quantises it."""
    layer: int | None = None
    """Index of its decoder layer; None outside of them."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The widths of a decoder layer, in elements a token."""

    on_kernels: bool
    """Whether norms, attention and MLP (except experts) run on rlsloth's kernels."""
    queries: int
    """Width of the queries: heads times their size."""
    keys: int
    """Width of the keys, and of the values; 0 for a layer without keys."""
    heads: int
    """Number of query heads."""
    normed: bool
    """Whether queries and keys have norms."""
    sandwich: bool
    """Whether there are also norms after attention and after the MLP."""
    scores: bool
    """Whether attention has a softcap or sinks, so that its scores are stored (plain_attention)."""
    window: int | None
    """Sliding window in tokens; scores of longer sequences are stored as well."""
    width: int
    """Width of the MLP's gate, or of one expert's."""
    chosen: int
    """Number of experts that compute a token; 0 for a dense MLP."""
    fused_mlp: bool
    """Whether gate and up are one linear layer (Phi-3), which the MLP's kernel does not take."""
    ranks: int
    """Sum of the adapters' ranks, each rounded up to the kernels' ALIGNMENT."""
    rank: int
    """Largest of these rounded ranks."""
    adapted_inputs: int
    """Sum of the adapted layers' input widths, which PEFT's modules copy to float32."""
    norms_on_kernels: bool = False
    """Whether the layer's norms run on our kernels, even if its linear layers do not."""
    dora_outputs: int = 0
    """Sum of the output widths of the layers whose adapter is a DoRA."""

    @property
    def key_heads(self) -> int:
        """Number of key heads, and of value heads."""
        return self.keys * self.heads // self.queries


@dataclass(frozen=True, slots=True)
class Fused:
    """A linear layer as vLLM has it: one of the model's, or several SIBLINGS in one."""

    out: int
    """Number of outputs."""
    into: int
    """Number of inputs."""
    rank: int
    """Sum of the ranks of its adapters."""
    quantised: bool
    """Whether ``--model.precision nf4`` quantises it."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a causal language model with its adapters."""

    name: str
    """Name of the model's class."""
    hidden: int
    """Hidden size."""
    vocabulary: int
    """Number of rows of the output head."""
    context: int
    """Largest number of tokens that the model supports."""
    weights: tuple[Weight, ...]
    layers: tuple[Layer, ...]
    largest_matrix: int
    """Number of elements of the largest linear layer stacked with its adapters (nf4.ahead.Job)."""
    trained: tuple[int, ...]
    """Number of elements of each trained tensor."""
    reference: int
    """Number of elements of the frozen copy of a starting adapter."""
    head_rank: int
    """Rank of the adapter on the output head, rounded up to ALIGNMENT; 0 without one."""
    fused: tuple[Fused, ...]
    """The linear layers as vLLM has them; the output head only if it is adapted."""
    dora_weights: int = 0
    """Number of elements, in float32, that PEFT makes for the largest layer with a DoRA."""
    embedding: int = 0
    """Number of elements of an embedding that can be in host memory; 0 if it cannot."""
    whole: bool = False
    """Whether the trained tensors are weights of the model itself, which ``weights`` has, too."""
    layer_trained: int = 0
    """Most elements that a layer of such a model trains."""
    head_trained: bool = False
    """Whether the output head is one of them."""
    stored_in_nf4: bool = False
    """Whether the checkpoint stores its linear layers in NF4, which loading keeps."""
    attention: str = field(default="varlen", compare=False)
    """Name of the attention backend that is assumed for training."""
    sums: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Results of functions that are ``remembered``."""

    @property
    def kv_width(self) -> int:
        """Number of elements of one token's keys and values, over all layers."""
        return sum(2 * layer.keys for layer in self.layers)


def remembered(
    function: Callable[Concatenate[ModelShape, Parameters], Result],
) -> Callable[Concatenate[ModelShape, Parameters], Result]:
    """Compute a function of a model once for each value of its other arguments.

    The choice of placements makes many plans of one model. functools.cache would compare its
    sizes, layer by layer, with those of another plan's model.
    """

    @wraps(function)
    def lookup(shape: ModelShape, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        key = function, *args, *kwargs.items()
        if key not in shape.sums:
            shape.sums[key] = function(shape, *args, **kwargs)
        result: Result = shape.sums[key]
        return result

    return lookup


@remembered
def layer_kinds(shape: ModelShape) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """Return the different layers of a model, and for each layer the index of its equal there."""
    kinds = dict.fromkeys(shape.layers)
    places = {layer: index for index, layer in enumerate(kinds)}
    return tuple(kinds), tuple(places[layer] for layer in shape.layers)


@remembered
def linear_weights(shape: ModelShape) -> int:
    """Return the number of weights of the linear layers that a token is multiplied with."""
    experts = sum(3 * layer.chosen * layer.width * shape.hidden for layer in shape.layers)
    return experts + sum(linear.out * linear.into for linear in shape.fused)
