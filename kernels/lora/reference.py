"""LoRA (Hu et al. 2021, arXiv:2106.09685) in plain torch, in any dtype: the reference for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from rlsloth.kernels.glu.reference import glu_reference

Linear = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, float]
"""A linear as (weight [O, I], bias [O], A [r, I], B [O, r], scale)."""


def lora_linear_reference(x: Tensor, linear: Linear) -> Tensor:
    """``x W^T + bias + scale (x A^T) B^T``."""
    weight_OI, bias_O, a_RI, b_OR, scale = linear
    y = torch.nn.functional.linear(x, weight_OI, bias_O)
    if a_RI is not None and b_OR is not None:
        y = y + scale * ((x @ a_RI.t()) @ b_OR.t())
    return y


def lora_mlp_reference(
    x: Tensor, gate: Linear, up: Linear, down: Linear, activation: str
) -> Tensor:
    """``down(act(gate(x)) * up(x))``."""
    h = glu_reference(lora_linear_reference(x, gate), lora_linear_reference(x, up), activation)
    return lora_linear_reference(h, down)
