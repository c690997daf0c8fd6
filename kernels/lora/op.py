"""Linears with LoRA, or whose weights learn: those that share an input together, an MLP as a whole.

With ``low = scale dY B`` the gradients are ``dX = dY W + low A``, ``dA = low^T X`` and
``dB = scale dY^T (X A^T)``: two products with the frozen weight, forward and backward together,
while autograd through a trainable weight takes three. A weight that requires grad gets the third
one, ``dW = dY^T X``. Products of the parameters run in x's dtype; their gradients are summed in
float32 and returned in the parameters' dtype. Autocast has no effect.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlsloth.kernels.glu.op import ACTIVATIONS, glu_forward
from rlsloth.kernels.lora import autograd, mlp, mlp_tiles
from rlsloth.kernels.lora.layer import LoraLinear, leaves
from rlsloth.kernels.nf4.ahead import dequantize_ahead

__all__ = ["LoraLinear", "lora_linear", "lora_linears", "lora_mlp"]

# Without gradient, up to this many tokens are multiplied by packed NF4: a dequantised weight would
# be written and read again, 4.5 bytes per weight in total instead of 0.5. On an H100 (14336 x 4096)
# this takes 0.048 ms at 128 rows and 0.094 at 256; dequantising first takes 0.107.
DECODED_ROWS = 256


def lora_linear(x: Tensor, layer: LoraLinear, *, decode: bool = True) -> Tensor:
    """Return ``x W^T + bias + scale (x A^T) B^T``: ``lora_linears`` with one layer."""
    return lora_linears(x, (layer,), decode=decode)[0]


def lora_linears(
    x: Tensor,
    layers: tuple[LoraLinear, ...],
    *,
    outputs: tuple[Tensor, ...] | None = None,
    decode: bool = True,
) -> tuple[Tensor, ...]:
    """Return the outputs of layers that share an input (q, k, v), each [..., O], in x's dtype.

    Differentiable in x, in every lora_a and lora_b, and in weights and biases. x is read once for
    all A, and its gradient is summed in one buffer. There is no dropout: adapters with dropout do
    not share an input.

    Args:
        x: [..., I], in the weights' dtype; any dimension before the last may be 0.
        outputs: results of the same call, which are then returned in place of new ones: for the
            second forward of activation checkpointing.
        decode: multiply a few rows by packed NF4 where no gradient is needed. False: the result is
            bitwise that with a gradient.

    Raises:
        TypeError: x is not in the weights' dtype.
        ValueError: a wrong shape or device.
    """
    for layer in layers:
        _check(x, layer)
    x_TI = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if _needs_graph(x, layers):
            known = None if outputs is None else [y.flatten(0, -2) for y in outputs]
            made = autograd.LinearsFunction.apply(  # type: ignore[no-untyped-call]
                x_TI, layers, known, *leaves(layers)
            )
        elif decode and _decodes(x_TI):
            made = autograd.linears_decoded(x_TI, layers)
        else:
            made, _ = autograd.linears(x_TI, layers, autograd.Adapters.of(layers))
    return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[-1]) for y_TO in made)


def lora_mlp(
    x: Tensor,
    gate: LoraLinear,
    up: LoraLinear,
    down: LoraLinear,
    activation: str,
    *,
    tile_rows: int | None = None,
    inner_only: bool = False,
    decode: bool = True,
) -> Tensor:
    """Return ``down(act(gate(x)) * up(x))`` [..., H], differentiable like ``lora_linears``.

    Keeps x and the outputs of gate and up, which the backward overwrites: a graph can be
    differentiated only once. The backward also holds one more tensor of that width. Under
    non-reentrant activation checkpointing the second forward stops before down.

    Args:
        x: [..., H], in the weights' dtype.
        activation: "silu", "gelu_tanh" or "gelu".
        tile_rows: compute at most this many tokens at a time, forward and backward; then only x is
            kept, and the backward computes gate and up again. None: all tokens at once.
        inner_only: compute only what the backward keeps, and return a tensor without content: for
            the second forward of activation checkpointing.
        decode: as in ``lora_linears``.

    Raises:
        TypeError: x is not in the weights' dtype.
        ValueError: a wrong shape or device, or an unknown activation.
    """
    _check(x, gate)
    _check(x, up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if up.weight.shape != gate.weight.shape or down.weight.shape[1] != gate.weight.shape[0]:
        shapes = [tuple(layer.weight.shape) for layer in (gate, up, down)]
        raise ValueError(f"gate, up and down have shapes {shapes}, which do not fit together")
    if down.weight.dtype != x.dtype or down.weight.device != x.device:
        raise TypeError(f"down is {down.weight.dtype} on {down.weight.device}, x is {x.dtype}")
    layers = (gate, up, down)
    x_TH = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        if inner_only and _needs_graph(x, layers):
            y_TH = _inner(x_TH, layers, activation, tile_rows)[0]
        else:
            y_TH = _mlp(x_TH, layers, activation, tile_rows, _needs_graph(x, layers), decode)
    return y_TH.view(*x.shape[:-1], y_TH.shape[-1])


def _mlp(
    x_TH: Tensor,
    layers: mlp.Mlp,
    activation: str,
    tile_rows: int | None,
    with_graph: bool,
    decode: bool,
) -> Tensor:
    gate, up, down = layers
    if decode and not with_graph and _decodes(x_TH):
        e_TF, g_TF = autograd.linears_decoded(x_TH, (gate, up))
        h_TF = glu_forward(e_TF, g_TF, activation, out=e_TF)
        return autograd.linears_decoded(h_TF, (down,))[0]
    if not with_graph:
        parts = mlp.Parts(layers, activation)
        if tile_rows is not None and x_TH.shape[0] > tile_rows:
            return mlp_tiles.forward(x_TH, parts, tile_rows)
        matrices = dequantize_ahead(parts.jobs())
        h_wide, *_ = mlp.inner(x_TH, parts, matrices)
        return mlp.outer(h_wide, parts, matrices)
    token_TH, outer = _inner(x_TH, layers, activation, tile_rows)
    return outer(token_TH)


def _inner(
    x_TH: Tensor, layers: mlp.Mlp, activation: str, tile_rows: int | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute what the backward keeps: a token without content, and the function of the rest."""
    parts, parameters = mlp.Parts(layers, activation), leaves(layers)
    if tile_rows is not None and x_TH.shape[0] > tile_rows:
        token_TH: Tensor = mlp_tiles.TiledInnerFunction.apply(  # type: ignore[no-untyped-call]
            x_TH, parts, tile_rows, *parameters
        )
        tiled: Callable[..., Tensor] = mlp_tiles.TiledOuterFunction.apply
        return token_TH, lambda token: tiled(token, x_TH.detach(), parts, tile_rows)
    matrices = dequantize_ahead(parts.jobs())
    token_TH, h_wide = mlp.InnerFunction.apply(  # type: ignore[no-untyped-call]
        x_TH, parts, matrices, *parameters
    )
    outer: Callable[..., Tensor] = mlp.OuterFunction.apply
    return token_TH, lambda token: outer(token, h_wide, parts, matrices)


def _needs_graph(x: Tensor, layers: tuple[LoraLinear, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p is not None and p.requires_grad for p in leaves(layers))


def _decodes(x_TI: Tensor) -> bool:
    return 1 <= x_TI.shape[0] <= DECODED_ROWS


def _check(x: Tensor, layer: LoraLinear) -> None:
    weight = layer.weight
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)}, expected [..., {weight.shape[1]}]")
    if x.dtype != weight.dtype:
        raise TypeError(f"x is {x.dtype}, weight {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, weight on {weight.device}")
