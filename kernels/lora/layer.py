"""A frozen linear with its adapter, and the adapters of siblings as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsloth.kernels.nf4.op import DTYPES, Nf4Weight

# Rows of a matrix with room are then 32 bytes apart: cuBLAS has slow kernels for less than 16, and
# Triton stores whole vectors only where a stride is a multiple of 16.
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
    """In the input's dtype; R is a multiple of ALIGNMENT, rows without a layer are zeros."""
    spans: tuple[slice, ...]
    """The rows of each layer; none where its adapter is off."""


def stack(layers: Sequence[LoraLinear]) -> Stack | None:
    """None where every adapter is off."""
    parts: list[Tensor] = []
    spans, end = [], 0
    for layer in layers:
        start = end
        if layer.lora_a is not None:
            parts.append(layer.lora_a.detach().to(layer.weight.dtype))
            end += layer.lora_a.shape[0]
        spans.append(slice(start, end))
    if not parts:
        return None
    if end % ALIGNMENT:
        parts.append(parts[0].new_zeros(-end % ALIGNMENT, parts[0].shape[1]))
    return Stack(parts[0] if len(parts) == 1 else torch.cat(parts), tuple(spans))


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
