"""Bench gated linear units against a copy of the bytes they must move, against Liger and torch.

The error is the largest one of an output, relative to the largest output, on the first rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module

import torch
from torch import Tensor

from rlsloth.kernels.glu.op import glu, glu_backward
from rlsloth.kernels.glu.reference import glu_reference
from rlsloth.kernels.measure import Case, Run, copy_of, normal

SHAPES = {"cuda": (8192, 14336), "cpu": (48, 96)}
CHECKED_ROWS = 64

Glu = Callable[[Tensor, Tensor], Tensor]


def cases(device: torch.device) -> Iterator[Case]:
    """Yield forward, forward + backward (also on halves of one tensor), and backward in place."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows, width = SHAPES[device.type]
    gate = normal(rows, width, device=device, dtype=dtype)
    up = normal(rows, width, device=device, dtype=dtype)
    shape = f"T {rows} F {width}"
    yield _case(f"silu, forward, {shape}", gate, up, "silu", passes=3)
    one, two = torch.cat((gate, up), -1).chunk(2, -1)
    yield _case(f"silu, forward, gate and up in one, {shape}", one, two, "silu", passes=3)
    for activation in ("silu", "gelu_tanh"):
        one, two = gate.clone().requires_grad_(), up.clone().requires_grad_()
        yield _case(f"{activation}, forward + backward, {shape}", one, two, activation, passes=8)
    # This overwrites its inputs each time, so the values drift; the bytes moved do not.
    d_out = normal(rows, width, device=device, dtype=dtype)
    yield Case(
        "glu",
        f"silu, backward in place, {shape}",
        lambda: glu_backward(d_out, gate, up, "silu"),
        copy_of(6 * gate.nbytes, device),
        "copy of 6 gates",
    )


def _case(shape: str, gate: Tensor, up: Tensor, activation: str, passes: int) -> Case:
    """Make a case; ``passes`` is how many tensors like the gate must be read or written."""
    peers: dict[str, Callable[[], Glu]] = {
        "liger": lambda: _liger(activation),
        "eager": lambda: lambda gate, up: glu_reference(gate, up, activation),
    }

    def error() -> float:
        gates, ups = gate[:CHECKED_ROWS].detach(), up[:CHECKED_ROWS].detach()
        wanted = glu_reference(gates.double(), ups.double(), activation)
        return float((glu(gates, ups, activation) - wanted).abs().max() / wanted.abs().max())

    return Case(
        "glu",
        shape,
        _run(lambda gate, up: glu(gate, up, activation), gate, up),
        copy_of(passes * gate.nbytes, gate.device),
        f"copy of {passes} gates",
        {name: lambda make=make: _run(make(), gate, up) for name, make in peers.items()},  # type: ignore[misc]
        error,
    )


def _run(function: Glu, gate: Tensor, up: Tensor) -> Run:
    if not gate.requires_grad:
        return lambda: function(gate, up)
    # A tensor of its own: Liger's backward writes over what it saved.
    leaves = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    grad = torch.randn_like(gate)
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def _liger(activation: str) -> Glu:
    if activation == "silu":
        function = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    else:
        function = import_module("liger_kernel.ops.geglu").LigerGELUMulFunction
    return lambda gate, up: function.apply(gate, up)
