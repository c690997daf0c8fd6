"""A linear with its adapter, and the stacked adapters of linears that share an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlsloth.kernels.nf4.op import DTYPES, Nf4Weight

# Ranks are padded to multiples of this, which puts rows of a matrix whole 32 bytes apart. cuBLAS
# has slow kernels below 16 bytes, and Triton moves whole vectors only for strides of multiples of
# 16.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """``y = x W^T + bias + scale (x A^T) B^T``; W and bias are frozen beside an adapter."""

    weight: Tensor | Nf4Weight
    """[O, I], float32, bfloat16 or float16; it learns if it requires grad, like the bias."""
    bias: Tensor | None = None
    """[O], in the weight's dtype."""
    lora_a: Tensor | None = None
    """[r, I], float32 or in the weight's dtype; None, like lora_b, if the adapter is off."""
    lora_b: Tensor | None = None
    """[O, r], float32 or in the weight's dtype."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Stack:
    """The A matrices of layers that share an input, stacked so that the input is read once."""

    a_RI: Tensor  # noqa: N815 -- fields carry shape suffixes too
    """[R, I], in the weights' dtype."""
    spans: tuple[slice, ...]
    """The rows of each layer, a multiple of ALIGNMENT with zeros past its rank; None if its adapter
    is off."""


def stack(layers: Sequence[LoraLinear]) -> Stack | None:
    """Stack the layers' A matrices; return None if every adapter is off."""
    given = [None if layer.lora_a is None else layer.lora_a.detach() for layer in layers]
    live = [a for a in given if a is not None]
    if not live:
        return None
    spans = spans_of(layers)
    end = spans[-1].stop
    make = torch.empty if end == sum(len(a) for a in live) else torch.zeros
    a_RI = make(end, live[0].shape[1], dtype=layers[0].weight.dtype, device=live[0].device)
    rows = [
        a_RI[span.start :][: len(a)] for a, span in zip(given, spans, strict=True) if a is not None
    ]
    torch._foreach_copy_(rows, live)  # one kernel for many short copies
    return Stack(a_RI, spans)


def spans_of(layers: Sequence[LoraLinear]) -> tuple[slice, ...]:
    """Return each layer's rows in the stack."""
    spans, end = [], 0
    for layer in layers:
        start, rank = end, 0 if layer.lora_a is None else len(layer.lora_a)
        end += rank + -rank % ALIGNMENT
        spans.append(slice(start, end))
    return tuple(spans)


def scaled_b(layer: LoraLinear) -> Tensor | None:
    """Return ``scale * B`` [O, R] in the weight's dtype, R being the rows of A in a stack."""
    if layer.lora_b is None:
        return None
    b_OR = _scaled(layer.lora_b.detach(), layer.scale, layer.weight.dtype)
    missing = -b_OR.shape[1] % ALIGNMENT
    return pad(b_OR, (0, missing)) if missing else b_OR


def gradients(
    layer: LoraLinear, grad_a_RI: Tensor | None, grad_b_OR: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of A and B in their dtypes, from the sums for A and ``scaled_b``."""
    if layer.lora_a is None or layer.lora_b is None:
        return None, None
    assert grad_a_RI is not None
    assert grad_b_OR is not None
    rank = layer.lora_a.shape[0]
    grad_b = _scaled(grad_b_OR[:, :rank], layer.scale, layer.lora_b.dtype)
    # A copy: the sums of all layers may share one storage.
    grad_a = torch.empty_like(layer.lora_a, memory_format=torch.contiguous_format)
    return grad_a.copy_(grad_a_RI[:rank]), grad_b


def leaves(layers: Sequence[LoraLinear]) -> list[Tensor | None]:
    """List what may learn in each layer: A, B, weight and bias; None for a frozen or absent one."""
    return [x for layer in layers for x in (layer.lora_a, layer.lora_b, *_trained(layer))]


def _trained(layer: LoraLinear) -> tuple[Tensor | None, Tensor | None]:
    weight = layer.weight if isinstance(layer.weight, Tensor) else None
    return (
        weight if weight is not None and weight.requires_grad else None,
        layer.bias if layer.bias is not None and layer.bias.requires_grad else None,
    )


def trained_gradients(
    layer: LoraLinear, grad_TO: Tensor, x_TI: Tensor | None, *, wide: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``dW = dy^T x`` and the bias's gradient, None for a frozen one.

    Args:
        layer: the layer.
        grad_TO: the gradient of its output.
        x_TI: its input, which a frozen weight does not need.
        wide: leave the sums in float32, for a sum over tiles.
    """
    weight, bias = _trained(layer)
    grad_weight = grad_bias = None
    if weight is not None:
        assert x_TI is not None
        # In 16 bits, too, the product's sums are float32 and are rounded once.
        grad_weight = gram(grad_TO, x_TI) if wide else grad_TO.t() @ x_TI
    if bias is not None:
        grad_bias = grad_TO.sum(0, dtype=torch.float32 if wide else None)
    return grad_weight, grad_bias


def gram(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """Return ``left^T right`` in float32: a sum over all tokens."""
    if left_TM.dtype == torch.float32:
        return left_TM.t() @ right_TN
    if left_TM.is_cuda:
        return torch.mm(left_TM.t(), right_TN, out_dtype=torch.float32)
    return left_TM.float().t() @ right_TN.float()


def _scaled(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return ``scale * x``, rounded once, by one kernel: there are many of these, all short."""
    return torch.mul(x, scale, out=torch.empty(x.shape, dtype=dtype, device=x.device))


def _check(layer: LoraLinear) -> None:
    weight = layer.weight
    if len(weight.shape) != 2:
        raise ValueError(f"weight has {len(weight.shape)} dimensions, expected 2")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight is {weight.dtype}, expected float32, bfloat16 or float16")
    out, into = weight.shape
    if (layer.lora_a is None) != (layer.lora_b is None):
        raise ValueError("only one of lora_a and lora_b is None: pass both or neither")
    rank = 0 if layer.lora_a is None else layer.lora_a.shape[0]
    shapes = {"bias": (out,), "lora_a": (rank, into), "lora_b": (out, rank)}
    for name, shape in shapes.items():
        tensor = getattr(layer, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device}, weight on {weight.device}")
        if tensor.dtype not in {weight.dtype, weight.dtype if name == "bias" else torch.float32}:
            raise TypeError(f"{name} is {tensor.dtype}, weight {weight.dtype}")
    if layer.lora_a is not None and any(x is not None for x in _trained(layer)):
        raise ValueError("weight or bias requires grad beside an adapter: detach them")
