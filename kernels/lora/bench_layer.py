"""A decoder layer without attention, for the bench: q takes the place of attention's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsloth.kernels.lora.layer import LoraLinear
from rlsloth.kernels.lora.op import lora_linear, lora_linears, lora_mlp
from rlsloth.kernels.lora.reference import Linear, lora_linear_reference, lora_mlp_reference
from rlsloth.kernels.measure import Run, normal
from rlsloth.kernels.nf4.bench import random_weight
from rlsloth.kernels.nf4.op import Nf4Weight, dequantize
from rlsloth.kernels.rms_norm.op import add_rms_norm, fork_rms_norm
from rlsloth.kernels.rms_norm.reference import rms_norm_reference
from rlsloth.kernels.rope.op import rope
from rlsloth.kernels.rope.reference import rope_reference

EPS = 1e-5
NAMES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a layer and of its input."""

    tokens: int
    hidden: int
    heads: int
    key_heads: int
    dim: int
    width: int
    rank: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of each linear, by name."""
        query, key = self.heads * self.dim, self.key_heads * self.dim
        sizes = (query, key, key, self.hidden, self.width, self.width, self.hidden)
        into = (self.hidden,) * 3 + (query,) + (self.hidden,) * 2 + (self.width,)
        return dict(zip(NAMES, zip(sizes, into, strict=True), strict=True))


LLAMA_8B = Sizes(8192, 4096, 32, 8, 128, 14336, 32)
TINY = Sizes(24, 64, 4, 2, 16, 192, 8)


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights, adapters, tables, an input and the gradients of the three outputs (y, k, v)."""

    sizes: Sizes
    linears: dict[str, LoraLinear]
    norms: tuple[Tensor, Tensor]
    cos: Tensor
    sin: Tensor
    x: Tensor
    grads: tuple[Tensor, Tensor, Tensor]

    def leaves(self) -> list[Tensor]:
        """Return the leaves to differentiate: the input and the adapters."""
        return [self.x, *adapters(self.linears)]

    def first(self, tokens: int) -> Layer:
        """Return the layer with the first tokens of its input only."""
        y_grad, k_grad, v_grad = self.grads
        return replace(
            self,
            x=self.x.detach()[:, :tokens].clone().requires_grad_(),
            cos=self.cos[:, :tokens],
            sin=self.sin[:, :tokens],
            grads=(y_grad[:, :tokens], k_grad[:, :tokens], v_grad[:, :tokens]),
        )


def make_layer(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Layer:
    """Make a layer of NF4 weights whose adapters add about a tenth to each output."""
    linears = {}
    for name, (out, into) in sizes.shapes().items():
        weight = replace(random_weight(out, into, device), dtype=dtype)
        a = normal(sizes.rank, into, device=device, dtype=dtype, scale=into**-0.5)
        b = normal(out, sizes.rank, device=device, dtype=dtype, scale=0.1 * sizes.rank**-0.5)
        linears[name] = LoraLinear(weight, None, a.requires_grad_(), b.requires_grad_(), 1.0)
    angles = torch.randn(1, sizes.tokens, sizes.dim // 2, device=device).repeat(1, 1, 2)
    keys = sizes.key_heads * sizes.dim

    def norm() -> Tensor:
        return 1 + normal(sizes.hidden, device=device, dtype=dtype, scale=0.1)

    def rows(width: int) -> Tensor:
        return normal(1, sizes.tokens, width, device=device, dtype=dtype)

    return Layer(
        sizes,
        linears,
        (norm(), norm()),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        rows(sizes.hidden).requires_grad_(),
        (rows(sizes.hidden), rows(keys), rows(keys)),
    )


Outputs = tuple[Tensor, Tensor, Tensor]
Forward = Callable[[Layer], Outputs]


def heads(layer: Layer, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k as [1, T, heads, dim]."""
    dim = layer.sizes.dim
    return q.view(*q.shape[:2], -1, dim), k.view(*k.shape[:2], -1, dim)


def forward(layer: Layer) -> Outputs:
    """Return (y, k, v), computed by our kernels."""
    names = layer.linears
    normed, x = fork_rms_norm(layer.x, layer.norms[0], EPS)
    q, k, v = lora_linears(normed, (names["q"], names["k"], names["v"]))
    q, k = rope(*heads(layer, q, k), layer.cos, layer.sin, inplace=True)
    o = lora_linear(q.flatten(2), names["o"])
    normed, total = add_rms_norm(o, x, layer.norms[1], EPS)
    y = total + lora_mlp(normed, names["gate"], names["up"], names["down"], "silu")
    return y, k.flatten(2), v


def forward_reference(layer: Layer) -> tuple[Outputs, list[Tensor]]:
    """Return (y, k, v) in float64, and the leaves: the input, then each A and B."""
    x = layer.x.detach().double().requires_grad_()
    linears = {name: _wide(linear) for name, linear in layer.linears.items()}
    norms = [norm.double() for norm in layer.norms]
    normed = rms_norm_reference(x, norms[0], EPS)
    q, k, v = (lora_linear_reference(normed, linears[name]) for name in "qkv")
    q, k = rope_reference(*heads(layer, q, k), layer.cos.double(), layer.sin.double())
    total = x + lora_linear_reference(q.flatten(2), linears["o"])
    normed = rms_norm_reference(total, norms[1], EPS)
    y = total + lora_mlp_reference(normed, linears["gate"], linears["up"], linears["down"], "silu")
    leaves = [leaf for linear in linears.values() for leaf in linear[2:4] if leaf is not None]
    return (y, k.flatten(2), v), [x, *leaves]


def error(layer: Layer) -> float:
    """Return the largest relative error (in the root mean square) of an output or a gradient."""
    outputs = forward(layer)
    wanted, wanted_leaves = forward_reference(layer)
    grads = torch.autograd.grad(outputs, layer.leaves(), layer.grads)
    wide = [grad.double() for grad in layer.grads]
    wanted_grads = torch.autograd.grad(wanted, wanted_leaves, wide)
    pairs = zip((*outputs, *grads), (*wanted, *wanted_grads), strict=True)
    return max(
        ((actual - exact).square().mean() / exact.square().mean()).sqrt().item()
        for actual, exact in pairs
    )


def both_ways(forward: Forward, layer: Layer, leaves: list[Tensor]) -> Run:
    """Make a run of forward and backward, down to the leaves."""
    return lambda: torch.autograd.grad(forward(layer), leaves, layer.grads)


def bare_products(layer: Layer, names: tuple[str, ...]) -> Run:
    """Make a run of only the products with the frozen weights, forward and backward, in 16 bits."""
    tokens = layer.x.shape[1]
    sets = []
    for name in names:
        weight = layer.linears[name].weight
        assert isinstance(weight, Nf4Weight)
        matrix_OI = dequantize(weight)
        x_TI, y_TO = (
            normal(tokens, size, device=matrix_OI.device, dtype=matrix_OI.dtype)
            for size in (weight.shape[1], weight.shape[0])
        )
        sets.append((x_TI, y_TO, matrix_OI, torch.empty_like(x_TI), torch.empty_like(y_TO)))

    def run() -> None:
        for x_TI, _, matrix_OI, _, y_out in sets:
            torch.mm(x_TI, matrix_OI.t(), out=y_out)
        for _, y_TO, matrix_OI, x_out, _ in reversed(sets):
            torch.mm(y_TO, matrix_OI, out=x_out)

    return run


def adapters(linears: dict[str, LoraLinear]) -> list[Tensor]:
    """Return each A and B, in the order of the linears."""
    parts = [x for linear in linears.values() for x in (linear.lora_a, linear.lora_b)]
    return [x for x in parts if x is not None]


def _wide(linear: LoraLinear) -> Linear:
    weight, a, b = linear.weight, linear.lora_a, linear.lora_b
    assert isinstance(weight, Nf4Weight)
    assert a is not None
    assert b is not None
    # In float32 the dequantised weight is exact.
    matrix_OI = dequantize(replace(weight, dtype=torch.float32)).double()
    wide_a, wide_b = (x.detach().double().requires_grad_() for x in (a, b))
    return matrix_OI, None, wide_a, wide_b, linear.scale
