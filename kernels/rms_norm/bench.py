"""Bench RMSNorm against a copy of the bytes it must move, against Liger and torch.

The error is the largest one of an output, relative to the largest output, on the first rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

from rlsloth.kernels.measure import Case, Run, copy_of, normal
from rlsloth.kernels.rms_norm.op import add_rms_norm, rms_norm
from rlsloth.kernels.rms_norm.reference import rms_norm_reference

SHAPES = {"cuda": [(8192, 4096), (8192, 2048), (8192 * 40, 128)], "cpu": [(48, 96), (96, 16)]}
EPS = 1e-6
CHECKED_ROWS = 64

Norm = Callable[[Tensor, Tensor], Tensor]
AddNorm = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield forward, forward + backward (weight frozen or trained), then both with the addition."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for rows, width in SHAPES[device.type]:
        x = normal(rows, width, device=device, dtype=dtype)
        weight_H = 1 + normal(width, device=device, dtype=dtype, scale=0.1)
        shape = f"T {rows} H {width}"
        yield _case(f"forward, {shape}", x, weight_H, passes=2)
        yield _case(f"forward + backward, {shape}", x.clone().requires_grad_(), weight_H, passes=5)
    rows, width = SHAPES[device.type][0]
    x = normal(rows, width, device=device, dtype=dtype).requires_grad_()
    weight_H = normal(width, device=device, dtype=dtype).requires_grad_()
    shape = f"T {rows} H {width}"
    yield _case(f"forward + backward, trained weight, {shape}", x, weight_H, passes=5)
    x, weight_H = x.detach(), weight_H.detach()
    yield _add_case(f"add, forward, {shape}", x, weight_H, passes=4)
    yield _add_case(f"add, forward + backward, {shape}", x.requires_grad_(), weight_H, passes=8)


def _case(shape: str, x: Tensor, weight_H: Tensor, passes: int) -> Case:
    """Make a case; ``passes`` is how many tensors like x must be read or written."""
    peers: dict[str, Callable[[], Norm]] = {"liger": _liger, "torch": _torch, "eager": _eager}

    def error() -> float:
        rows, weight = x[:CHECKED_ROWS].detach(), weight_H.detach()
        wanted = rms_norm_reference(rows.double(), weight.double(), EPS)
        return float((rms_norm(rows, weight, EPS) - wanted).abs().max() / wanted.abs().max())

    return Case(
        "rms_norm",
        shape,
        _run(lambda x, weight_H: rms_norm(x, weight_H, EPS), x, weight_H),
        copy_of(passes * x.nbytes, x.device),
        f"copy of {passes} x",
        {name: lambda make=make: _run(make(), x, weight_H) for name, make in peers.items()},  # type: ignore[misc]
        error,
    )


def _add_case(shape: str, x: Tensor, weight_H: Tensor, passes: int) -> Case:
    return Case(
        "rms_norm",
        shape,
        _add_run(
            lambda x, residual, weight_H: add_rms_norm(x, residual, weight_H, EPS), x, weight_H
        ),
        copy_of(passes * x.nbytes, x.device),
        f"copy of {passes} x",
        {
            "liger": lambda: _add_run(_liger_add(), x, weight_H),
            "torch": lambda: _add_run(_torch_add(), x, weight_H),
        },
    )


def _run(norm: Norm, x: Tensor, weight_H: Tensor) -> Run:
    leaves = [leaf for leaf in (x, weight_H) if leaf.requires_grad]
    if not leaves:
        return lambda: norm(x, weight_H)
    grad = torch.randn_like(x)  # a tensor of its own: Liger's backward writes over it
    return lambda: torch.autograd.grad(norm(x, weight_H), leaves, grad)


def _add_run(norm: AddNorm, x: Tensor, weight_H: Tensor) -> Run:
    residual = torch.randn_like(x).requires_grad_(x.requires_grad)
    if not x.requires_grad:
        return lambda: norm(x, residual, weight_H)
    grads = torch.randn_like(x), torch.randn_like(x)
    return lambda: torch.autograd.grad(norm(x, residual, weight_H), (x, residual), grads)


def _liger() -> Norm:
    function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return lambda x, weight_H: function.apply(x, weight_H, EPS)


def _torch() -> Norm:
    return lambda x, weight_H: functional.rms_norm(x, weight_H.shape, weight_H, EPS)


def _eager() -> Norm:
    def norm(x: Tensor, weight_H: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return weight_H * wide.to(x.dtype)

    return norm


def _liger_add() -> AddNorm:
    function = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return lambda x, residual, weight_H: function.apply(x, residual, weight_H, EPS)


def _torch_add() -> AddNorm:
    norm = _torch()

    def add_norm(x: Tensor, residual: Tensor, weight_H: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, weight_H), total

    return add_norm
