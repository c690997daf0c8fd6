"""Gated linear units in Triton: one piece of a row per program, all its loads before its stores."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

from rlsloth.kernels.device import cdiv, on_device_of

# Elements per program: a power of two, no smaller than its threads load at once, so that no two
# threads hold the same element. Smaller in the backward, which keeps three inputs in registers.
FORWARD_BLOCK, BACKWARD_BLOCK, WARPS = 2048, 1024, 4


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which cannot run PTX."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def forward(gate_NF: Tensor, up_NF: Tensor, h_NF: Tensor, activation: str) -> None:
    """Write ``act(gate) * up`` to h, which may be gate or up."""
    rows, width = gate_NF.shape
    if gate_NF.numel() == 0:
        return
    blocks = cdiv(width, FORWARD_BLOCK)
    # Triton launches on the current device.
    with on_device_of(gate_NF):
        _forward_kernel[(rows * blocks,)](
            gate_NF,
            gate_NF.stride(0),
            up_NF,
            up_NF.stride(0),
            h_NF,
            h_NF.stride(0),
            width,
            blocks,
            ACTIVATION=activation,
            BLOCK=FORWARD_BLOCK,
            INTERPRETED=interpreted(),
            num_warps=WARPS,
        )


def backward(
    d_out_NF: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
    h_NF: Tensor | None,
    d_gate_NF: Tensor,
    d_up_NF: Tensor,
    activation: str,
) -> None:
    """Write the gradients of gate and up, and h unless it is None; each may overwrite its input."""
    rows, width = gate_NF.shape
    if gate_NF.numel() == 0:
        return
    blocks = cdiv(width, BACKWARD_BLOCK)
    with on_device_of(gate_NF):
        _backward_kernel[(rows * blocks,)](
            d_out_NF,
            d_out_NF.stride(0),
            gate_NF,
            gate_NF.stride(0),
            up_NF,
            up_NF.stride(0),
            h_NF,
            0 if h_NF is None else h_NF.stride(0),
            d_gate_NF,
            d_gate_NF.stride(0),
            d_up_NF,
            d_up_NF.stride(0),
            width,
            blocks,
            ACTIVATION=activation,
            BLOCK=BACKWARD_BLOCK,
            INTERPRETED=interpreted(),
            num_warps=WARPS,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(
    gate_ptr: tl.tensor,
    gate_stride: tl.tensor,
    up_ptr: tl.tensor,
    up_stride: tl.tensor,
    h_ptr: tl.tensor,
    h_stride: tl.tensor,
    width: tl.tensor,
    blocks: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    share, _ = _share_and_slope(gate, ACTIVATION, INTERPRETED)
    tl.store(h_ptr + row * h_stride + column, gate * share * up, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(
    d_out_ptr: tl.tensor,
    d_out_stride: tl.tensor,
    gate_ptr: tl.tensor,
    gate_stride: tl.tensor,
    up_ptr: tl.tensor,
    up_stride: tl.tensor,
    h_ptr: tl.tensor,
    h_stride: tl.tensor,
    d_gate_ptr: tl.tensor,
    d_gate_stride: tl.tensor,
    d_up_ptr: tl.tensor,
    d_up_stride: tl.tensor,
    width: tl.tensor,
    blocks: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    d_out = tl.load(d_out_ptr + row * d_out_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    share, slope = _share_and_slope(gate, ACTIVATION, INTERPRETED)
    activated = gate * share
    if h_ptr is not None:
        # In place a thread must write only what it read; this ensures it for any layout.
        tl.debug_barrier()
        tl.store(h_ptr + row * h_stride + column, activated * up, mask=inside)
    d_gate = d_out * up * (share + gate * slope)
    tl.store(d_gate_ptr + row * d_gate_stride + column, d_gate, mask=inside)
    tl.store(d_up_ptr + row * d_up_stride + column, d_out * activated, mask=inside)


# 1 / (1 + 2**(-x / ln 2)) with an error of a few 1e-7 (20 ulp for x near -20). It takes half of the
# instructions and registers of Triton's own code, which guards against denormals that cannot
# matter when added to 1.
SIGMOID = tl.constexpr("""{
.reg .f32 a;
mul.ftz.f32 a, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 a, a;
add.ftz.f32 a, a, 0f3F800000;
rcp.approx.ftz.f32 $0, a;
}""")


@triton.jit  # type: ignore[untyped-decorator]
def _sigmoid(x: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    if INTERPRETED:
        return tl.sigmoid(x)
    return tl.inline_asm_elementwise(SIGMOID, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit  # type: ignore[untyped-decorator]
def _share_and_slope(
    gate: tl.tensor, ACTIVATION: tl.constexpr, INTERPRETED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the share of the gate that the activation passes, and the derivative of that share."""
    if ACTIVATION == "silu":
        share = _sigmoid(gate, INTERPRETED)
        slope = share * (1.0 - share)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    else:
        # 0.5 * (1 + tanh(u)) = sigmoid(2 * u). Beyond 20 the share is 0 or 1 in float32; a cube
        # that overflows would make the slope 0 * inf.
        near = tl.clamp(gate, -20.0, 20.0)
        share = _sigmoid(1.5957691216057308 * near * (1.0 + 0.044715 * near * near), INTERPRETED)
        slope = share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    return share, slope
