"""The table of transformers' module classes that can run on our kernels, and their differences.

A module is wrapped only if its class is in the table and the module matches the description in its
children, attributes and arguments of forward (``mismatch``). All further modules keep transformers'
own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm over the last dimension: ``x / rms(x) * (offset + weight)``."""

    eps: str = "variance_epsilon"
    """Name of the module's attribute with epsilon."""
    offset: float = 0.0
    """Number added to the weight."""


@dataclass(frozen=True, slots=True)
class Mlp:
    """Gated MLP: ``down(activation(gate(x)) * up(x))``."""

    activation: str = "hidden_act"
    """Key of the configuration that names the activation."""
    fused: bool = False
    """Whether gate and up are the halves of one linear layer, ``gate_up_proj``."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention with rotary positions, by transformers' attention interface."""

    arguments: Mapping[str, str] = field(default_factory=dict)
    """Further keyword of the attention function -> name of the module's attribute with its value.

    ``config.x`` means key x of the configuration, or None if it is missing.
    """
    normed: bool = False
    """Whether queries and keys have RMSNorms over the head dimension."""
    fused: bool = False
    """Whether queries, keys and values are parts of one linear layer, ``qkv_proj``."""
    half_tables: bool = False
    """Whether cos and sin contain each angle once rather than twice."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Decoder layer: norm, attention, residual, norm, MLP, residual."""

    sandwich: bool = False
    """Whether there are also norms after attention and after the MLP, before the residual."""


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """A class that is known, but left to transformers on purpose."""

    reason: str
    """The reason, for the report."""


Spec = Norm | Mlp | Attention | Layer | Unwrapped


def _family(folder: str, prefix: str, **parts: Spec) -> dict[str, Spec]:
    path = f"transformers.models.{folder}.modeling_{folder}.{prefix}"
    return {path + part: spec for part, spec in parts.items()}


_WINDOW = {"sliding_window": "sliding_window"}
_CONFIG_WINDOW = {"sliding_window": "config.sliding_window"}
_CAPPED = {**_WINDOW, "softcap": "attn_logit_softcapping"}
_SINKS = {**_WINDOW, "s_aux": "sinks"}
_GEMMA: dict[str, Spec] = {
    "RMSNorm": Norm("eps", 1.0),
    "MLP": Mlp("hidden_activation"),
    "DecoderLayer": Layer(True),
}
_EXPERTS = Unwrapped(
    "a mixture of experts, on torch's grouped products, with weights that are never quantised"
)

KNOWN: dict[str, Spec] = {
    **_family(
        "llama", "Llama", RMSNorm=Norm(), MLP=Mlp(), Attention=Attention(), DecoderLayer=Layer()
    ),
    **_family(
        "qwen2",
        "Qwen2",
        RMSNorm=Norm(),
        MLP=Mlp(),
        Attention=Attention(_WINDOW),
        DecoderLayer=Layer(),
    ),
    **_family(
        "qwen3",
        "Qwen3",
        RMSNorm=Norm(),
        MLP=Mlp(),
        Attention=Attention(_WINDOW, normed=True),
        DecoderLayer=Layer(),
    ),
    **_family(
        "mistral",
        "Mistral",
        RMSNorm=Norm(),
        MLP=Mlp(),
        Attention=Attention(_CONFIG_WINDOW),
        DecoderLayer=Layer(),
    ),
    **_family(
        "phi3",
        "Phi3",
        RMSNorm=Norm(),
        MLP=Mlp(fused=True),
        Attention=Attention(_CONFIG_WINDOW, fused=True),
        DecoderLayer=Layer(),
    ),
    **_family("gemma2", "Gemma2", **_GEMMA, Attention=Attention(_CAPPED)),
    **_family("gemma3", "Gemma3", **_GEMMA, Attention=Attention(_WINDOW, normed=True)),
    **_family(
        "qwen3_moe",
        "Qwen3Moe",
        RMSNorm=Norm(),
        MLP=Mlp(),
        SparseMoeBlock=_EXPERTS,
        Attention=Attention(_WINDOW, normed=True),
        DecoderLayer=Layer(),
    ),
    **_family(
        "gpt_oss",
        "GptOss",
        RMSNorm=Norm(),
        MLP=_EXPERTS,
        Attention=Attention(_SINKS, half_tables=True),
        DecoderLayer=Layer(),
    ),
}
"""Full name of a class -> its description.

DeepSeek-R1's distilled models have the classes of Qwen 2 and Llama, Phi-4 those of Phi-3.
"""

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""Name of an activation in transformers -> its name in our kernels."""


def spec_of(module: nn.Module) -> Spec | None:
    """Return the description of a module's class, or None if the class is unknown.

    A subclass of a known class is unknown, because it may compute anything.
    """
    cls = type(module)
    return KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")


def mismatch(module: nn.Module, spec: Norm | Mlp | Attention | Layer) -> str | None:
    """Return the reason why a module of a known class cannot be wrapped, or None if it can."""
    if "forward" in vars(module):
        return "its forward was replaced already"
    children = {name for name, child in module.named_children() if type(child) is not nn.Dropout}
    if children != (wanted := _children(spec)):
        return f"its parts differ from the known class ({', '.join(sorted(children ^ wanted))})"
    if any(type(child) is nn.Dropout and child.p > 0 for child in module.children()):
        return "it contains a dropout"
    missing = [name for name in _attributes(spec) if not hasattr(module, name)]
    if missing:
        return f"it lacks {', '.join(missing)}"
    if unknown := set(inspect.signature(type(module).forward).parameters) - _ARGUMENTS[type(spec)]:
        return f"its forward has unknown arguments ({', '.join(sorted(unknown))})"
    if isinstance(spec, Mlp):
        activation = getattr(module.config, spec.activation)
        if activation not in ACTIVATIONS:
            return f"the activation {activation} has no kernel"
    return None


_ATTENTION_ARGUMENTS = {
    "self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs",
}  # fmt: skip
_ARGUMENTS = {
    Norm: {"self", "x", "hidden_states"},
    Mlp: {"self", "x", "hidden_states"},
    Attention: _ATTENTION_ARGUMENTS,
    Layer: {*_ATTENTION_ARGUMENTS, "position_ids", "use_cache"},
}


def _children(spec: Norm | Mlp | Attention | Layer) -> set[str]:
    match spec:
        case Norm():
            return set()
        case Mlp(fused=True):
            return {"gate_up_proj", "down_proj", "activation_fn"}
        case Mlp():
            return {"gate_proj", "up_proj", "down_proj", "act_fn"}
        case Attention(fused=True):
            return {"qkv_proj", "o_proj"}
        case Attention():
            norms = {"q_norm", "k_norm"} if spec.normed else set()
            return {"q_proj", "k_proj", "v_proj", "o_proj", *norms}
        case Layer():
            after = {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
            both = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
            return both | after if spec.sandwich else both


def _attributes(spec: Norm | Mlp | Attention | Layer) -> list[str]:
    match spec:
        case Norm():
            return ["weight", spec.eps]
        case Mlp():
            return ["config"]
        case Attention():
            own = [name for name in spec.arguments.values() if "." not in name]
            return ["config", "head_dim", "layer_idx", "scaling", "attention_dropout", *own]
        case Layer():
            return []
