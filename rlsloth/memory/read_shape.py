"""Read a model's sizes from its modules, even on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rlsloth.kernels.lora.layer import ALIGNMENT
from rlsloth.memory.shape import Fused, Group, Layer, ModelShape, Weight
from rlsloth.policy.config_values import value_of
from rlsloth.policy.host_embedding import can_offload
from rlsloth.policy.layers import decoder_layers
from rlsloth.policy.support import not_stored_in_nf4, stored_in_nf4
from rlsloth.policy.whole import WholeModel

SIBLINGS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Linear layers with a common input: nf4.ahead stacks their adapters, and vLLM fuses them."""


def read_shape(model: Any) -> ModelShape:
    """Read the sizes of a trained model (PEFT's, or a WholeModel), wrapped or not, or quantised."""
    base, whole = model.get_base_model(), isinstance(model, WholeModel)
    config, decoder = base.config.get_text_config(), base.get_decoder()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    table = getattr(embeddings, "base_layer", embeddings)
    weights, trained, reference = [], [], 0
    seen: set[torch.Tensor] = set()
    skipped, modules = _not_quantised(base), decoder_layers(decoder)
    layer_of = {part: i for i, layer in enumerate(modules) for part in layer.modules()}
    for module_name, module in base.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and p not in seen:  # a tied head has the embedding's
                seen.add(p)
                trained.append(p.numel())
            if p.requires_grad and not whole:
                continue
            if ".lora_" in module_name:
                reference += p.numel()
            elif p is not _weight_of(embeddings) or module is table:
                group = _group(p, _weight_of(head), _weight_of(embeddings))
                packed = name == "weight" and (type(module) is nn.Linear or _is_packed(p))
                packed &= not _is_skipped(module_name.removesuffix(".base_layer"), skipped)
                count = _shape_of(p).numel()
                weights.append(Weight(group, count, packed, layer_of.get(module)))
    dtype = _weight_of(embeddings).dtype
    fused = [joined for layer in modules for joined in _fused(layer, skipped)]
    if _lora_rank(head):
        out, into = _shape_of(_weight_of(head))
        fused.append(Fused(out, into, _lora_rank(head), quantised=False))
    return ModelShape(
        name=type(base).__name__,
        hidden=config.hidden_size,
        vocabulary=_weight_of(head).shape[0],
        context=int(config.max_position_embeddings),
        weights=tuple(weights),
        layers=tuple(_layer(layer, config, dtype) for layer in modules),
        largest_matrix=max(_with_adapters(layer, skipped) for layer in modules),
        trained=tuple(trained),
        reference=reference,
        head_rank=_rank(head),
        fused=tuple(fused),
        dora_weights=max(_dora_weights(m) for layer in modules for _, m in _linears(layer)),
        embedding=0
        if whole or not can_offload(base)
        else _shape_of(_weight_of(embeddings)).numel(),
        whole=whole,
        layer_trained=max(map(_trained, modules)) if whole else 0,
        head_trained=whole and _weight_of(head).requires_grad,
        stored_in_nf4=stored_in_nf4(base.config),
    )


def _not_quantised(base: Any) -> list[str]:
    """List modules that transformers does not quantise: the head, tied and float32 modules."""
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = [*get_keys_to_not_convert(base), *(base._keep_in_fp32_modules or ())]
    kept += not_stored_in_nf4(base.config)
    return [name.replace(".base_layer", "") for name in kept if ".lora_" not in name]


def _is_skipped(name: str, skipped: list[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, skipped)


def _weight_of(module: Any) -> torch.Tensor:
    weight: torch.Tensor = getattr(module, "base_layer", module).weight
    return weight


def _is_packed(weight: torch.Tensor) -> bool:
    return getattr(weight, "quant_state", None) is not None


def _shape_of(weight: Any) -> torch.Size:
    """Return a parameter's shape, without regard to NF4's packing."""
    shape: torch.Size = weight.quant_state.shape if _is_packed(weight) else weight.shape
    return shape


def _group(p: torch.Tensor, head: torch.Tensor, embeddings: torch.Tensor) -> Group:
    if p is embeddings:
        return "embeddings"
    if p is head:
        return "head"
    if p.dim() >= 3:
        return "experts"
    return "linears" if p.dim() == 2 else "norms and biases"


def _linears(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the linear layers of a module with their names, wrapped by PEFT or not."""
    for name, child in module.named_modules():
        if hasattr(child, "base_layer") or (
            isinstance(child, nn.Linear) and ".lora_" not in f".{name}" and "base_layer" not in name
        ):
            yield name, child


def _trained(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


def _lora_rank(linear: Any) -> int:
    """Return the rank of a linear layer's adapter, 0 without one."""
    adapters = getattr(linear, "lora_A", None)
    return next(iter(adapters.values())).weight.shape[0] if adapters else 0


def _rank(linear: Any) -> int:
    """Return the rank of a layer's adapter, rounded up to the kernels' ALIGNMENT."""
    return -(-_lora_rank(linear) // ALIGNMENT) * ALIGNMENT


def _has_dora(linear: Any) -> bool:
    return bool(getattr(linear, "lora_magnitude_vector", None))


def _dora_weights(linear: Any) -> int:
    """Count the float32 elements that a forward of PEFT's DoRA makes, whatever its input.

    These are the identity, and of the weight's size the update, the update with its scale, the
    base's weight and the sum.
    """
    if not _has_dora(linear):
        return 0
    out, into = _shape_of(_weight_of(linear))
    return into * into + 4 * out * into


def _with_adapters(layer: nn.Module, skipped: list[str]) -> int:
    """Count the elements of a layer's largest matrix, stacked with its siblings' adapters."""
    found = [
        (name, *_shape_of(_weight_of(linear)), _rank(linear)) for name, linear in _linears(layer)
    ]
    largest = 0
    for name, out, into, rank in found:
        if _is_skipped(name, skipped):
            continue
        mine = next((s for s in SIBLINGS if name.rpartition(".")[2] in s), ())
        stacked = sum(r for n, *_, r in found if n.rpartition(".")[2] in mine) or rank
        largest = max(largest, (out + stacked) * into, out * (into + stacked))
    return largest


def _fused(layer: nn.Module, skipped: list[str]) -> list[Fused]:
    """List a decoder layer's linear layers as vLLM has them."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, linear in _linears(layer):
        parent, _, last = name.rpartition(".")
        place = next((f"{parent} {s}" for s in SIBLINGS if last in s), name)
        groups.setdefault(place, []).append((name, linear))
    return [
        Fused(
            out=sum(_shape_of(_weight_of(linear))[0] for _, linear in parts),
            into=_shape_of(_weight_of(parts[0][1]))[1],
            rank=sum(_lora_rank(linear) for _, linear in parts),
            quantised=not _is_skipped(parts[0][0], skipped),
        )
        for parts in groups.values()
    ]


def _kernels(module: Any, dtype: torch.dtype) -> set[str]:
    """Name the kernels on which a module's replaced forward runs (policy.wrap.forwards)."""
    forward = vars(module).get("forward")
    if not hasattr(forward, "linears"):
        return set()
    lora = {k for k, linears in forward.linears.items() if not linears.left(dtype)}
    return {*forward.kernels, *lora}


def _layer(layer: Any, config: Any, dtype: torch.dtype) -> Layer:
    found = dict(_linears(layer))
    kernels = set().union(*(_kernels(m, dtype) for m in layer.modules()))
    experts = [m for m in layer.modules() if any(p.dim() == 3 for p in m.parameters(recurse=False))]
    attention = getattr(layer, "self_attn", None)
    heads = config.num_attention_heads
    size = getattr(attention, "head_dim", None) or config.hidden_size // heads
    key_heads = value_of(config, "num_key_value_heads")
    if key_heads is None:  # not given, or layers differ in it
        keys = found.get("self_attn.k_proj")
        key_heads = _shape_of(_weight_of(keys))[0] // size if keys is not None else heads
    down = next((x for n, x in found.items() if n.endswith("down_proj")), None)
    width = _shape_of(_weight_of(down))[1] if down is not None else config.intermediate_size
    if experts:
        width = value_of(config, "moe_intermediate_size") or config.intermediate_size
    window = getattr(attention, "sliding_window", None)
    if window is None and getattr(config, "layer_types", None) is None:
        window = getattr(config, "sliding_window", None)
    return Layer(
        on_kernels={"lora_qkv", "lora_o", "rope"} <= kernels
        and ("lora_mlp" in kernels or bool(experts)),
        norms_on_kernels="rms_norm" in kernels,
        queries=heads * size,
        keys=0 if attention is None else key_heads * size,
        heads=heads,
        normed=hasattr(attention, "q_norm"),
        sandwich=hasattr(layer, "pre_feedforward_layernorm"),
        scores=bool(getattr(config, "attn_logit_softcapping", None)) or hasattr(attention, "sinks"),
        window=window,
        width=width,
        chosen=config.num_experts_per_tok if experts else 0,
        fused_mlp=any(name.endswith("gate_up_proj") for name in found),
        ranks=sum(_rank(linear) for linear in found.values()),
        rank=max((_rank(linear) for linear in found.values()), default=0),
        adapted_inputs=sum(_shape_of(_weight_of(x))[1] for x in found.values() if _rank(x)),
        dora_outputs=sum(_shape_of(_weight_of(x))[0] for x in found.values() if _has_dora(x)),
    )
