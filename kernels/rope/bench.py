"""Bench rotary embedding against a copy of the bytes it must move, against Liger and torch.

The error is the largest one of a rotated query, relative to the largest query, on the first tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

import torch
from torch import Tensor

from rlsloth.kernels.measure import Case, Run, copy_of, normal
from rlsloth.kernels.rope.op import rope
from rlsloth.kernels.rope.reference import rope_reference

# Tokens, query heads, key heads, head dimension: Llama-3.1-8B's, then Qwen2.5-7B's.
SHAPES = {"cuda": [(8192, 32, 8, 128), (8192, 28, 4, 128)], "cpu": [(48, 4, 2, 16)]}
CHECKED_TOKENS = 64

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Rope = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield forward, forward in place, and forward with backward."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for tokens, heads, key_heads, dim in SHAPES[device.type]:
        q = normal(1, tokens, heads, dim, device=device, dtype=dtype)
        k = normal(1, tokens, key_heads, dim, device=device, dtype=dtype)
        cos, sin = tables(tokens, dim, device, dtype)
        shape = f"T {tokens} heads {heads}+{key_heads} D {dim}"
        yield _case(f"forward, {shape}", rope, (q, k, cos, sin))
        yield _case(
            f"forward in place, {shape}", _rope_inplace,
            (q.clone(), k.clone(), cos, sin),
        )  # fmt: skip
        leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
        yield _case(f"forward + backward, {shape}", rope, (*leaves, cos, sin))


def tables(
    tokens: int, rotary: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [1, tokens, rotary] for base 10000, both halves equal."""
    frequencies = 10000.0 ** -(torch.arange(0, rotary, 2, device=device) / rotary)
    angles = torch.outer(torch.arange(tokens, device=device).float(), frequencies)
    angles = torch.cat((angles, angles), -1)[None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _case(shape: str, ours: Rope, inputs: Inputs) -> Case:
    q, k, cos, sin = inputs

    def error() -> float:
        q, k, cos, sin = (x[:, :CHECKED_TOKENS].detach().clone() for x in inputs)
        wanted, _ = rope_reference(q.double(), k.double(), cos.double(), sin.double())
        return float((ours(q, k, cos, sin)[0] - wanted).abs().max() / wanted.abs().max())

    moved = 2 * (q.nbytes + k.nbytes) + (cos.nbytes + sin.nbytes) // 2
    moved *= 2 if q.requires_grad else 1
    return Case(
        "rope",
        shape,
        _run(ours, inputs),
        copy_of(moved, q.device),
        "copy",
        {
            "liger": lambda: _liger_run(inputs),
            "eager": lambda: _run(rope_reference, inputs),
        },
        error,
    )


def _rope_inplace(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(q, k, cos, sin, inplace=True)


def _run(function: Rope, inputs: Inputs) -> Run:
    q, k, _, _ = inputs
    if not q.requires_grad:
        return lambda: function(*inputs)
    grads = torch.randn_like(q), torch.randn_like(k)
    return lambda: torch.autograd.grad(function(*inputs), (q, k), grads)


def _liger_run(inputs: Inputs) -> Run:
    """Run Liger, which takes [B, heads, S, D] views of [B, S, heads, D] and overwrites them."""
    function = import_module("liger_kernel.ops.rope").LigerRopeFunction
    q, k = (x.detach().clone().transpose(1, 2).requires_grad_(x.requires_grad) for x in inputs[:2])
    if not q.requires_grad:
        return lambda: function.apply(q, k, *inputs[2:])
    grads = torch.randn_like(q), torch.randn_like(k)
    return lambda: torch.autograd.grad(function.apply(q, k, *inputs[2:]), (q, k), grads)
