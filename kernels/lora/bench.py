"""Bench NF4 + LoRA, forward and backward, against the bare products with the frozen weights.

The error is the largest relative error (in the root mean square) of an output or a gradient, over
the first tokens and against float64 with the exact NF4 weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlsloth.kernels.lora.bench_layer import (
    LLAMA_8B,
    TINY,
    Layer,
    adapters,
    bare_products,
    both_ways,
    error,
    forward,
    make_layer,
)
from rlsloth.kernels.lora.op import lora_linears, lora_mlp
from rlsloth.kernels.lora.peers import peers
from rlsloth.kernels.measure import Case, Run

CHECKED_TOKENS = 64


def cases(device: torch.device) -> Iterator[Case]:
    """Yield the whole layer, then the two parts of it that take most of its time."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    layer = make_layer(LLAMA_8B if cuda else TINY, device, dtype)
    sizes = layer.sizes
    shape = f"T {sizes.tokens} H {sizes.hidden} F {sizes.width} r {sizes.rank}"
    every = tuple(layer.linears)
    yield Case(
        "lora",
        f"layer, {shape}",
        both_ways(forward, layer, layer.leaves()),
        bare_products(layer, every),
        "bare products",
        peers(layer),
        lambda: error(layer.first(CHECKED_TOKENS)),
    )
    for name, run, names in (
        ("q k v", _siblings(layer), every[:3]),
        ("mlp", _mlp(layer), every[4:]),
    ):
        yield Case("lora", f"{name}, {shape}", run, bare_products(layer, names), "bare products")


def _siblings(layer: Layer) -> Run:
    linears = {name: layer.linears[name] for name in "qkv"}
    grads = [torch.randn_like(y) for y in lora_linears(layer.x, tuple(linears.values()))]
    leaves = [layer.x, *adapters(linears)]
    return lambda: torch.autograd.grad(
        lora_linears(layer.x, tuple(linears.values())), leaves, grads
    )


def _mlp(layer: Layer) -> Run:
    linears = {name: layer.linears[name] for name in ("gate", "up", "down")}
    leaves = [layer.x, *adapters(linears)]

    def run() -> tuple[Tensor, ...]:
        y = lora_mlp(layer.x, linears["gate"], linears["up"], linears["down"], "silu")
        return torch.autograd.grad(y, leaves, layer.grads[0])

    return run
