"""Layers with LoRA for tests of kernels/lora, compared with the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsloth.kernels.lora.layer import leaves
from rlsloth.kernels.lora.op import LoraLinear, lora_linears, lora_mlp
from rlsloth.kernels.lora.reference import lora_linear_reference, lora_mlp_reference
from rlsloth.kernels.nf4.op import Nf4Weight, dequantize


@dataclass(frozen=True)
class Kind:
    rank: int = 5
    nf4: bool = False
    bias: bool = False
    adapter_dtype: torch.dtype | None = None
    learns: bool = False


PLAIN, NF4, BIASED = Kind(), Kind(nf4=True), Kind(rank=8, bias=True)
BIASED_NF4, OFF, OFF_NF4 = Kind(nf4=True, bias=True), Kind(rank=0), Kind(rank=0, nf4=True)
LEARNT, BIASED_LEARNT = Kind(rank=0, learns=True), Kind(rank=0, bias=True, learns=True)


def make(out, into, kind=PLAIN, dtype=torch.float32, seed=0):
    """Make a layer whose output is about as large as its input, a third of it from the adapter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    weight = normal(out, into, scale=into**-0.5).to(dtype)
    if kind.nf4:
        count = out * into
        packed = torch.randint(0, 256, (count // 2,), dtype=torch.uint8, generator=generator)
        absmax = (torch.rand(-(-count // 64), generator=generator) + 0.5) * into**-0.5
        weight = Nf4Weight(packed, absmax, None, None, None, (out, into), dtype)
    bias = normal(out).to(dtype) if kind.bias else None
    if not kind.rank:
        for learnt in (weight, bias) if kind.learns else ():
            if learnt is not None:
                learnt.requires_grad_()
        return LoraLinear(weight, bias)
    adapter = kind.adapter_dtype or dtype
    a = normal(kind.rank, into, scale=into**-0.5).to(adapter).requires_grad_()
    b = normal(out, kind.rank, scale=0.1).to(adapter).requires_grad_()
    return LoraLinear(weight, bias, a, b, scale=1.7)


def parameters(layers):
    return [p for p in leaves(layers) if p is not None]


def wide(layer):
    """Return the reference's layer in float64, with new leaves."""
    weight = dequantize(layer.weight) if isinstance(layer.weight, Nf4Weight) else layer.weight
    made = (
        None if x is None else x.detach().double().requires_grad_(x.requires_grad)
        for x in (weight, layer.bias, layer.lora_a, layer.lora_b)
    )
    return *made, layer.scale


def wide_parameters(linears):
    """Return the leaves of the reference's layers, in the order of ``parameters``."""
    return [x for w, bias, a, b, _ in linears for x in (a, b, w, bias) if is_leaf(x)]


def is_leaf(x):
    return x is not None and x.requires_grad


def close(actual, wanted, dtype=torch.float32):
    tolerance = 1e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps
    error = (actual.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    assert error.item() < tolerance, error.item()


def input_like(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def check(run, reference, layers, x, dtype=torch.float32):
    """Check outputs and all gradients, then the outputs without gradient."""
    linears = [wide(layer) for layer in layers]
    wide_x = x.detach().double().requires_grad_()
    wanted = reference(wide_x, linears)
    grads = [torch.randn(y.shape, generator=torch.Generator().manual_seed(3)) for y in wanted]
    wanted_grads = torch.autograd.grad(
        wanted,
        [wide_x, *wide_parameters(linears)],
        [g.double() for g in grads],
    )
    x = x.detach().requires_grad_()
    outputs = run(x, layers)
    inputs = [x, *parameters(layers)]
    kept = [g.to(dtype) for g in grads]
    given = [g.clone() for g in kept]
    actual_grads = torch.autograd.grad(outputs, inputs, given)
    assert all(torch.equal(*pair) for pair in zip(kept, given, strict=True)), "dy was overwritten"
    for actual, y in zip(outputs, wanted, strict=True):
        assert actual.dtype == dtype
        close(actual, y, dtype)
    for actual, grad, leaf in zip(actual_grads, wanted_grads, inputs, strict=True):
        assert actual.dtype == leaf.dtype
        close(actual, grad, dtype)
    with torch.no_grad():
        for actual, y in zip(run(x, layers), wanted, strict=True):
            close(actual, y, dtype)


def siblings(x, layers):
    return lora_linears(x, tuple(layers))


def siblings_reference(x, linears):
    return tuple(lora_linear_reference(x, linear) for linear in linears)


def mlp(activation="silu"):
    def run(x, layers):
        gate, up, down = layers
        return (lora_mlp(x, gate, up, down, activation),)

    return run


def mlp_reference(activation="silu"):
    def run(x, linears):
        gate, up, down = linears
        return (lora_mlp_reference(x, gate, up, down, activation),)

    return run


def make_mlp(kinds, hidden=64, width=192, dtype=torch.float32):
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    return [
        make(*shape, kind, dtype, seed)
        for seed, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))
    ]
