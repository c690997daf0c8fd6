# ruff: noqa: N815 -- fields carry shape suffixes too
"""The model's final norm inside linear_logprob: neither the normed [N, H] nor its gradient exists.

Each chunk of the residual stream is normed before its product with the head, and its direction is
taken back through the norm at once. This is linear in the upstream gradient of a row, so the
backward of a frozen head is still a row scale.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsloth.kernels.rms_norm.op import rms_norm


@dataclass(frozen=True, slots=True)
class FinalNorm:
    """A frozen RMSNorm, ``x * rsqrt(mean(x**2) + eps) * (offset + weight)``."""

    weight_H: Tensor
    """[H], float32 or in the dtype of the hidden states."""
    eps: float
    offset: float = 0.0
    """1.0 for Gemma, whose weights are stored around zero."""

    def forward(self, x_RH: Tensor) -> Tensor:
        """Norm rows, rounded once, bitwise like ``rms_norm`` on any set of rows."""
        return rms_norm(x_RH, self.weight_H, self.eps, self.offset)

    def backward(self, grad_RH: Tensor, x_RH: Tensor) -> Tensor:
        """Return the gradient of x from the float32 gradient of the normed rows."""
        # The same choice as in rms_norm; TRITON_INTERPRET is Triton's own switch.
        if x_RH.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
            from rlsloth.kernels.rms_norm import triton

            return triton.backward(
                grad_RH, None, x_RH, self.weight_H, self.eps, self.offset, with_weight=False
            )[0]
        x_RH = x_RH.float()
        rstd_R1 = torch.rsqrt(x_RH.square().mean(1, keepdim=True) + self.eps)
        scaled_RH = grad_RH * (self.offset + self.weight_H.float())
        along_R1 = (scaled_RH * x_RH).mean(1, keepdim=True) * rstd_R1.square()
        return rstd_R1 * (scaled_RH - x_RH * along_R1)
