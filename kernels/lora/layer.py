"""A frozen linear with its adapter, and the adapters of siblings as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlsloth.kernels.nf4.op import DTYPES, Nf4Weight

# Of ranks: rows of a matrix with more columns are then whole 32 bytes apart. cuBLAS has slow
# kernels for less than 16, and Triton moves whole vectors only where a stride is a multiple of 16.
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """``y = x W^T + bias + scale (x A^T) B^T``; W and bias are frozen."""

    weight: Tensor | Nf4Weight
    """[O, I], float32, bfloat16 or float16."""
    bias: Tensor | None = None
    """[O], in the weight's dtype."""
    lora_a: Tensor | None = None
    """[r, I], float32 or in the weight's dtype; None, like lora_b, where the adapter is off."""
    lora_b: Tensor | None = None
    """[O, r], float32 or in the weight's dtype."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Stack:
    """The A of layers that share an input, one below the other: the input is read once."""

    a_RI: Tensor  # noqa: N815 -- fields carry shape suffixes too
    """In the weights' dtype."""
    spans: tuple[slice, ...]
    """The rows of each layer, a multiple of ALIGNMENT: zeros past its rank. None where its adapter
    is off.
    """


def stack(layers: Sequence[LoraLinear]) -> Stack | None:
    """None where every adapter is off."""
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
    torch._foreach_copy_(rows, live)  # one kernel: there are many of these, and each is short
    return Stack(a_RI, spans)


def spans_of(layers: Sequence[LoraLinear]) -> tuple[slice, ...]:
    """Of their stack."""
    spans, end = [], 0
    for layer in layers:
        start, rank = end, 0 if layer.lora_a is None else len(layer.lora_a)
        end += rank + -rank % ALIGNMENT
        spans.append(slice(start, end))
    return tuple(spans)


def scaled_b(layer: LoraLinear) -> Tensor | None:
    """``scale * B`` [O, R] in the weight's dtype, with as many columns as A has rows in a stack."""
    if layer.lora_b is None:
        return None
    b_OR = _scaled(layer.lora_b.detach(), layer.scale, layer.weight.dtype)
    missing = -b_OR.shape[1] % ALIGNMENT
    return pad(b_OR, (0, missing)) if missing else b_OR


def gradients(
    layer: LoraLinear, grad_a_RI: Tensor | None, grad_b_OR: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of A and B in their dtypes, from float32 sums; ``grad_b`` is that of ``scaled_b``."""
    if layer.lora_a is None or layer.lora_b is None:
        return None, None
    assert grad_a_RI is not None
    assert grad_b_OR is not None
    rank = layer.lora_a.shape[0]
    grad_b = _scaled(grad_b_OR[:, :rank], layer.scale, layer.lora_b.dtype)
    # A copy: the sums of all layers may share one storage.
    grad_a = torch.empty_like(layer.lora_a, memory_format=torch.contiguous_format)
    return grad_a.copy_(grad_a_RI[:rank]), grad_b


def _scaled(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale * x``, rounded once, by one kernel: there are many of these, and each is short."""
    return torch.mul(x, scale, out=torch.empty(x.shape, dtype=dtype, device=x.device))


def _check(layer: LoraLinear) -> None:
    weight = layer.weight
    if len(weight.shape) != 2:
        raise ValueError(f"weight has {len(weight.shape)} dimensions, expected 2")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight is {weight.dtype}, expected float32, bfloat16 or float16")
    out, into = weight.shape
    if (layer.lora_a is None) != (layer.lora_b is None):
        raise ValueError("lora_a and lora_b go together: give both or none")
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
    frozen = [weight] if isinstance(weight, Tensor) else []
    if any(x.requires_grad for x in [*frozen, layer.bias] if x is not None):
        raise ValueError("weight and bias are frozen here, but require grad")
