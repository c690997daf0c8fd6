"""Gated linear units (Shazeer 2020, arXiv:2002.05202): ``act(gate) * up``, element by element.

The backward recomputes the activation from the gate. With s the logistic function, S the normal
distribution function and c = sqrt(8 / pi):

    silu(g) = g * s(g)      gelu(g) = g * S(g)      gelu_tanh(g) = g * s(c * (g + 0.044715 * g**3))
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from rlsloth.kernels.glu.reference import glu_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``act(gate) * up``, computed in float32 and rounded once; contiguous and differentiable.

    Args:
        gate: [..., F], float32, bfloat16 or float16; any dimension may be 0. Gate and up may be
            the two halves of one [..., 2F]; a tensor whose rows have no common stride is copied.
        up: like gate.
        activation: "silu", "gelu_tanh" (Gemma's) or "gelu" (by the error function).

    Raises:
        TypeError: a wrong or mismatched dtype.
        ValueError: a wrong shape or device, or an unknown activation.
    """
    _check({"gate": gate, "up": up}, activation)
    if _by_triton(gate):
        return _GLU.apply(gate, up, activation)  # type: ignore[no-untyped-call, no-any-return]
    return glu_reference(gate.float(), up.float(), activation).to(gate.dtype).contiguous()


def glu_forward(gate: Tensor, up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """Compute ``glu`` without autograd, for a hand-derived backward; write to ``out`` if given.

    ``out`` is like gate and may be gate or up itself. All three need rows of one stride with a
    dense last dimension (else ValueError).
    """
    h = torch.empty_like(gate, memory_format=torch.contiguous_format) if out is None else out
    _check({"gate": gate, "up": up, "out": h}, activation)
    gate_NF, up_NF, h_NF = _rows(gate=gate, up=up, out=h)
    if _by_triton(gate):
        from rlsloth.kernels.glu import triton

        triton.forward(gate_NF, up_NF, h_NF, activation)
        increment_version(h)  # autograd must notice the write, and cannot see into a kernel
    else:
        h_NF.copy_(glu_reference(gate_NF.float(), up_NF.float(), activation))
    return h


def glu_backward(
    d_out: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``h = act(gate) * up`` and the gradients of gate and up in place, without memory.

    ``d_out`` is the gradient of h. ``h`` overwrites d_out, d_gate overwrites gate and d_up
    overwrites up; these three tensors are returned in this order. Each tensor needs rows of one
    stride with a dense last dimension, and no two may overlap (the halves of one [..., 2F] do
    not). Raises the errors of ``glu``, too.
    """
    _check({"gate": gate, "up": up, "d_out": d_out}, activation)
    d_out_NF, gate_NF, up_NF = _rows(d_out=d_out, gate=gate, up=up)
    if _by_triton(gate):
        from rlsloth.kernels.glu import triton

        triton.backward(d_out_NF, gate_NF, up_NF, d_out_NF, gate_NF, up_NF, activation)
        increment_version((d_out, gate, up))
    else:
        results = _backward_torch(d_out_NF, gate_NF, up_NF, activation)
        for storage, result in zip((d_out_NF, gate_NF, up_NF), results, strict=True):
            storage.copy_(result)
    return d_out, gate, up


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        from rlsloth.kernels.glu import triton

        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        h = torch.empty_like(gate, memory_format=torch.contiguous_format)
        triton.forward(_dense_rows(gate), _dense_rows(up), _dense_rows(h), activation)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        from rlsloth.kernels.glu import triton

        d_out_NF, gate_NF, up_NF = (_dense_rows(x) for x in (d_out, *ctx.saved_tensors))
        d_gate = torch.empty_like(d_out, memory_format=torch.contiguous_format)
        d_up = torch.empty_like(d_gate)
        triton.backward(
            d_out_NF,
            gate_NF,
            up_NF,
            None,
            _dense_rows(d_gate),
            _dense_rows(d_up),
            ctx.activation,
        )
        return d_gate, d_up, None


def _backward_torch(
    d_out_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide_gate, wide_up = gate_NF.detach().float(), up_NF.detach().float()
    with torch.enable_grad():
        leaves = wide_gate.requires_grad_(), wide_up.requires_grad_()
        h_NF = glu_reference(*leaves, activation)
        d_gate_NF, d_up_NF = torch.autograd.grad(h_NF, leaves, d_out_NF.detach().float())
    return h_NF.detach(), d_gate_NF, d_up_NF


def _by_triton(x: Tensor) -> bool:
    # TRITON_INTERPRET is Triton's own switch: kernels then run on CPU tensors.
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _dense_rows(x: Tensor) -> Tensor:
    """Reshape to [N, F] with a dense last dimension: a view if possible, else a copy."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _rows(**named: Tensor) -> list[Tensor]:
    """Return detached [N, F] views: writing to them writes to the tensors."""
    views = []
    for name, x in named.items():
        shape = x.shape[:-1].numel(), x.shape[-1]
        try:
            views.append(x.detach().view(shape))
        except RuntimeError:
            message = f"{name} has strides {list(x.stride())}: its rows have no common stride"
            raise ValueError(message) from None
        if shape[1] > 1 and views[-1].stride(1) != 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension, expected 1")
    return views


def _check(named: dict[str, Tensor], activation: str) -> None:
    gate = named["gate"]
    for name, x in named.items():
        if x.dim() < 1 or x.shape != gate.shape:
            raise ValueError(f"{name} is {list(x.shape)}, gate {list(gate.shape)}")
        if x.device != gate.device:
            raise ValueError(f"{name} is on {x.device}, gate on {gate.device}")
        if x.dtype not in DTYPES or x.dtype != gate.dtype:
            raise TypeError(
                f"{name} is {x.dtype}, gate {gate.dtype}: "
                "both must be float32, bfloat16 or float16, and the same"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
