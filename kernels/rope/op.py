"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys at once.

In the half-rotation convention of transformers, dimensions i and i + R/2 are rotated together:

    y[i] = x[i] * cos[i] - x[i + R/2] * sin[i]
    y[i + R/2] = x[i + R/2] * cos[i] + x[i] * sin[i]

The backward is the rotation by the opposite angle, so it keeps only cos and sin.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rope(
    q_BSHD: Tensor, k_BSKD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, computed in float32 and rounded once; cos and sin get no gradient.

    Args:
        q_BSHD: [B, S, heads, D], float32, bfloat16 or float16; any strides but a dense last
            dimension. B or S may be 0.
        k_BSKD: [B, S, key heads, D], like q.
        cos_BSR: [1 or B, S, R], R even and at most D, in any of these dtypes; dimensions from R on
            are not rotated. Both halves must be equal: only the first is read. If attention is
            scaled, cos and sin must include the scaling.
        sin_BSR: like cos.
        inplace: write over the storage of q and k and return tensors in that storage, with the
            strides of q and k; otherwise the results are new and contiguous. q and k must not be
            read afterwards, nor a tensor that they are views of. They may be views of one fused
            projection: it gets its gradients through the views as usual. An operation that saved
            the old values for its backward fails there with autograd's error about modified
            tensors.

    Raises:
        TypeError: a wrong or mismatched dtype.
        ValueError: a wrong shape, stride or device; in place, a leaf that requires grad (or a view
            of one), or an expanded tensor. Overlap of q with k is not checked.
    """
    _check(q_BSHD, k_BSKD, cos_BSR, sin_BSR)
    if inplace:
        _check_writable("q_BSHD", q_BSHD)
        _check_writable("k_BSKD", k_BSKD)
    return _Rope.apply(  # type: ignore[no-untyped-call, no-any-return]
        q_BSHD, k_BSKD, cos_BSR, sin_BSR, inplace
    )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BSHD: Tensor, k_BSKD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_BSR, sin_BSR)
        if not inplace:
            return _rotate(q_BSHD, k_BSKD, cos_BSR, sin_BSR, backward=False)
        # Not ctx.mark_dirty, which takes one view at most: to autograd these are new tensors. That
        # they share storage with q and k matters only to code that reads q and k again.
        outputs = q_BSHD.detach(), k_BSKD.detach()
        _rotate(q_BSHD, k_BSKD, cos_BSR, sin_BSR, backward=False, into=outputs)
        increment_version(outputs)  # autograd must notice the kernel's write to q and k
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        # Never in place: a gradient may be shared with other operations.
        dense = [x if x.stride(-1) == 1 else x.contiguous() for x in (grad_q, grad_k)]
        cos_BSR, sin_BSR = ctx.saved_tensors
        grads = _rotate(dense[0], dense[1], cos_BSR, sin_BSR, backward=True)
        return *grads, None, None, None


def _rotate(
    q_BSHD: Tensor,
    k_BSKD: Tensor,
    cos_BSR: Tensor,
    sin_BSR: Tensor,
    backward: bool,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return rotated q and k: new tensors, or ``into`` if given, which shares their storage."""
    outputs = into or (
        torch.empty_like(q_BSHD, memory_format=torch.contiguous_format),
        torch.empty_like(k_BSKD, memory_format=torch.contiguous_format),
    )
    # TRITON_INTERPRET is Triton's own switch: kernels then run on CPU tensors.
    if q_BSHD.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        from rlsloth.kernels.rope import triton

        triton.rotate((q_BSHD, k_BSKD), outputs, cos_BSR, sin_BSR, backward, into is not None)
    else:
        for x, output in zip((q_BSHD, k_BSKD), outputs, strict=True):
            _rotate_torch(x, output, cos_BSR, sin_BSR, backward)
    return outputs


def _rotate_torch(
    x_BSHD: Tensor, output_BSHD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, backward: bool
) -> None:
    rotary = cos_BSR.shape[-1]
    half = rotary // 2
    cos, sin = (table[..., None, :half].float() for table in (cos_BSR, sin_BSR))
    sin = -sin if backward else sin
    first, second = x_BSHD[..., :half].float(), x_BSHD[..., half:rotary].float()
    rotated = first * cos - second * sin, second * cos + first * sin
    output_BSHD[..., :half], output_BSHD[..., half:rotary] = rotated
    output_BSHD[..., rotary:] = x_BSHD[..., rotary:]


def _check(q_BSHD: Tensor, k_BSKD: Tensor, cos_BSR: Tensor, sin_BSR: Tensor) -> None:
    named = {"q_BSHD": q_BSHD, "k_BSKD": k_BSKD, "cos_BSR": cos_BSR, "sin_BSR": sin_BSR}
    for name, x in named.items():
        dimensions = 4 if x is q_BSHD or x is k_BSKD else 3
        if x.dim() != dimensions:
            raise ValueError(f"{name} has {x.dim()} dimensions, expected {dimensions}")
        if x.device != q_BSHD.device:
            raise ValueError(f"{name} is on {x.device}, q_BSHD on {q_BSHD.device}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} is {x.dtype}, expected float32, bfloat16 or float16")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension, expected 1")
    if k_BSKD.dtype != q_BSHD.dtype:
        raise TypeError(f"k_BSKD is {k_BSKD.dtype}, q_BSHD {q_BSHD.dtype}")
    batch, length, _, dim = q_BSHD.shape
    if (*k_BSKD.shape[:2], k_BSKD.shape[3]) != (batch, length, dim):
        raise ValueError(f"k_BSKD is {list(k_BSKD.shape)}, q_BSHD {list(q_BSHD.shape)}")
    rotary = cos_BSR.shape[2]
    if cos_BSR.shape[0] not in (1, batch) or cos_BSR.shape[1] != length or rotary > dim:
        raise ValueError(f"cos_BSR is {list(cos_BSR.shape)}, q_BSHD {list(q_BSHD.shape)}")
    if rotary % 2 or rotary == 0:
        raise ValueError(f"cos_BSR has {rotary} rotary dimensions, expected a positive even number")
    if sin_BSR.shape != cos_BSR.shape:
        raise ValueError(f"sin_BSR is {list(sin_BSR.shape)}, cos_BSR {list(cos_BSR.shape)}")


def _check_writable(name: str, x: Tensor) -> None:
    owner = x if x._base is None else x._base
    if torch.is_grad_enabled() and owner.is_leaf and owner.requires_grad:
        raise ValueError(f"{name} is a leaf that requires grad or a view of it: pass inplace=False")
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"{name} is expanded, its elements share memory: pass inplace=False")
