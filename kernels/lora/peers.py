"""The bench's layer run by PEFT with bitsandbytes and by Unsloth, by their public entry points."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from rlsloth.kernels.lora.bench_layer import EPS, Layer, Outputs, both_ways, heads
from rlsloth.kernels.lora.layer import LoraLinear
from rlsloth.kernels.measure import Run
from rlsloth.kernels.nf4.bench import bitsandbytes_state
from rlsloth.kernels.nf4.op import Nf4Weight
from rlsloth.kernels.rms_norm.reference import rms_norm_reference
from rlsloth.kernels.rope.reference import rope_reference


def peers(layer: Layer) -> dict[str, Callable[[], Run]]:
    """Return functions that prepare a peer's run, by name."""
    return {"PEFT + bitsandbytes": lambda: peft_run(layer), "Unsloth": lambda: _unsloth_run(layer)}


def peft_block(layer: Layer) -> Any:
    """Make q_proj ... down_proj: Linear4bit of the layer's weights with PEFT's adapters."""
    peft = import_module("peft")
    block = nn.Module()
    for name, linear in layer.linears.items():
        block.add_module(f"{name}_proj", _linear4bit(linear))
    config = peft.LoraConfig(
        r=layer.sizes.rank,
        lora_alpha=layer.sizes.rank,
        target_modules=[f"{name}_proj" for name in layer.linears],
    )
    block = peft.inject_adapter_in_model(config, block)
    for name, linear in layer.linears.items():
        module: Any = getattr(block, f"{name}_proj")
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(linear.lora_a)
            module.lora_B["default"].weight.copy_(linear.lora_b)
    return block


def peft_run(layer: Layer) -> Run:
    """Make PEFT's run; everything but the linears is plain torch, as in transformers."""
    block = peft_block(layer)

    def forward(layer: Layer) -> Outputs:
        normed = _eager_norm(layer.x, layer.norms[0])
        q, k, v = block.q_proj(normed), block.k_proj(normed), block.v_proj(normed)
        q, k = rope_reference(*heads(layer, q, k), layer.cos, layer.sin)
        total = layer.x + block.o_proj(q.flatten(2))
        normed = _eager_norm(total, layer.norms[1])
        h = nn.functional.silu(block.gate_proj(normed)) * block.up_proj(normed)
        return total + block.down_proj(h), k.flatten(2), v

    return both_ways(forward, layer, _leaves(layer, block))


def _unsloth_run(layer: Layer) -> Run:
    import_module("unsloth")
    kernels: Any = import_module("unsloth.kernels")
    block = peft_block(layer)
    norms = []
    for weight in layer.norms:
        norm: Any = nn.Module()
        norm.weight, norm.variance_epsilon = nn.Parameter(weight, requires_grad=False), EPS
        norms.append(norm)

    def forward(layer: Layer) -> Outputs:
        normed = kernels.fast_rms_layernorm(norms[0], layer.x)
        q, k, v = kernels.apply_lora_qkv(block, normed)
        q, k = (x.transpose(1, 2) for x in heads(layer, q, k))
        q, k = kernels.fast_rope_embedding(q, k, layer.cos, layer.sin)
        o = kernels.apply_lora_o(block, q.transpose(1, 2).flatten(2))
        total = layer.x + o
        normed = kernels.fast_rms_layernorm(norms[1], total)
        y = total + kernels.apply_lora_mlp_swiglu(block, normed)
        return y, k.transpose(1, 2).flatten(2), v

    return both_ways(forward, layer, _leaves(layer, block))


def _linear4bit(linear: LoraLinear) -> Any:
    bitsandbytes = import_module("bitsandbytes")
    weight = linear.weight
    assert isinstance(weight, Nf4Weight)
    out, into = weight.shape
    module = bitsandbytes.nn.Linear4bit(
        into, out, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    module.weight = bitsandbytes.nn.Params4bit(
        weight.packed_B.view(-1, 1),
        requires_grad=False,
        quant_state=bitsandbytes_state(weight),
        blocksize=weight.blocksize,
        compress_statistics=True,
        quant_type="nf4",
        bnb_quantized=True,
        module=module,
    )
    return module


def _leaves(layer: Layer, block: Any) -> list[Tensor]:
    return [layer.x, *(p for p in block.parameters() if p.requires_grad)]


def _eager_norm(x: Tensor, weight_H: Tensor) -> Tensor:
    return weight_H * rms_norm_reference(x.float(), torch.ones_like(weight_H).float(), EPS).to(
        x.dtype
    )
