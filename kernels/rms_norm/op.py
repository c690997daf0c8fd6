"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), alone and fused with a residual addition.

The backward keeps only x and the weight. It reads whole rows of x anyway, so it recomputes their
scale; with ``r = rsqrt(mean(x**2) + eps)`` and ``m = dy * (offset + weight)``,

    dx = r * (m - x * r**2 * mean(m * x))        dweight = sum over rows of dy * x * r
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsloth.kernels.rms_norm.reference import rms_norm_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 32768  # a row is held in registers


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute ``x * rsqrt(mean(x**2) + eps) * (offset + weight)`` over the last dimension.

    Computed in float32 and rounded once, to x's dtype. The result is contiguous and differentiable
    in x and in the weight, whose gradient is summed in float32 in an order that depends only on
    the shape and the device.

    Args:
        x: [..., H], float32, bfloat16 or float16; any dimension before the last may be 0. H may be
            a head's size. Rows without a common stride are copied.
        weight_H: float32 or like x.
        eps: added to the mean square.
        offset: 1.0 for Gemma, whose weights are stored around zero.

    Raises:
        TypeError: a wrong or mismatched dtype.
        ValueError: a wrong shape or device.
    """
    _check(x, weight_H)
    if _by_triton(x):
        return _RMSNorm.apply(x, weight_H, eps, offset)  # type: ignore[no-untyped-call, no-any-return]
    return _by_torch(x, weight_H, eps, offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_H: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (``rms_norm(total)``, total) for ``total = x + residual``, rounded to x's dtype.

    Arguments and errors are those of ``rms_norm``; the residual is like x. The gradients of x and
    residual are one tensor: code that receives them must not write to them.
    """
    _check(x, weight_H)
    if residual.shape != x.shape:
        raise ValueError(f"residual is {list(residual.shape)}, x {list(x.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}, x on {x.device}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}, x {x.dtype}")
    if _by_triton(x):
        return _AddRMSNorm.apply(  # type: ignore[no-untyped-call, no-any-return]
            x, residual, weight_H, eps, offset
        )
    total = (x + residual).contiguous()
    return _by_torch(total, weight_H, eps, offset), total


def fork_rms_norm(
    x: Tensor, weight_H: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (``rms_norm(x)``, x), for a residual connection around the block that follows.

    The two gradients of x are added inside the norm's backward, not in a separate pass. The
    returned x must not be written to. Arguments and errors are those of ``rms_norm``.
    """
    _check(x, weight_H)
    if _by_triton(x):
        return _AddRMSNorm.apply(  # type: ignore[no-untyped-call, no-any-return]
            x, None, weight_H, eps, offset
        )
    return _by_torch(x, weight_H, eps, offset), x


def _by_triton(x: Tensor) -> bool:
    # TRITON_INTERPRET is Triton's own switch: kernels then run on CPU tensors.
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _by_torch(x: Tensor, weight_H: Tensor, eps: float, offset: float) -> Tensor:
    return rms_norm_reference(x.float(), weight_H.float(), eps, offset).to(x.dtype).contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float, offset: float) -> Tensor:
        from rlsloth.kernels.rms_norm import triton

        ctx.save_for_backward(x, weight_H)
        ctx.eps, ctx.offset = eps, offset
        return triton.forward(x, None, weight_H, eps, offset)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from rlsloth.kernels.rms_norm import triton

        x, weight_H = ctx.saved_tensors
        grad_x, grad_weight_H = triton.backward(
            grad, None, x, weight_H, ctx.eps, ctx.offset, ctx.needs_input_grad[1]
        )
        return grad_x, grad_weight_H, None, None


class _AddRMSNorm(torch.autograd.Function):
    """Autograd of both fused forms; without a residual, total is x and its gradients are added."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight_H: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        from rlsloth.kernels.rms_norm import triton

        normed, total = triton.forward(x, residual, weight_H, eps, offset)
        ctx.forked = residual is None
        ctx.save_for_backward(total, weight_H)
        ctx.eps, ctx.offset = eps, offset
        ctx.set_materialize_grads(False)  # the last norm's total is not used
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from rlsloth.kernels.rms_norm import triton

        if grad is None:
            return grad_total, None if ctx.forked else grad_total, None, None, None
        total, weight_H = ctx.saved_tensors
        grad_x, grad_weight_H = triton.backward(
            grad, grad_total, total, weight_H, ctx.eps, ctx.offset, ctx.needs_input_grad[2]
        )
        return grad_x, None if ctx.forked else grad_x, grad_weight_H, None, None


def _check(x: Tensor, weight_H: Tensor) -> None:
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x is {list(x.shape)}, expected [..., H] with H from 1 to {MAX_WIDTH}")
    if weight_H.shape != x.shape[-1:]:
        raise ValueError(f"weight_H is {list(weight_H.shape)}, x {list(x.shape)}")
    if weight_H.device != x.device:
        raise ValueError(f"weight_H is on {weight_H.device}, x on {x.device}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}, expected float32, bfloat16 or float16")
    if weight_H.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"weight_H is {weight_H.dtype}, expected float32 or x's {x.dtype}")
