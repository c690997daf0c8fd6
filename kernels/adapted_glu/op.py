"""The gated unit of a LoRA MLP, fused with the adapters' work on its wide tensors.

Next to a product with a frozen weight, LoRA is narrow: it reads a few columns from a tensor as wide
as the model, or adds a few to it. Done separately, each of these is a pass over memory. Here they
share the passes of the gated unit, which loads the same tensors anyway:

    h = act(gate + gate_low B_gate^T) * (up + up_low B_up^T)        low = h A_down^T

and, backward, with ``dh = d_out + d_low A_down``: the gradients of gate and up, and
``dA_down = d_low^T h``, ``dB_gate = d_gate^T gate_low``, ``dB_up = d_up^T up_low``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from rlsloth.kernels.device import multiplies_in_triton
from rlsloth.kernels.glu.op import glu_backward, glu_forward

FUSED_RANK = 64  # more columns than this do not fit next to the tiles
CHUNK_ROWS = 2048  # rows at a time on the path that is not fused


@dataclass(frozen=True, slots=True)
class GluAdapters:
    """The adapters' factors, contiguous, in the dtype of the unit's tensors; None for an adapter
    that is off.
    """

    gate_b_FR: Tensor | None  # noqa: N815 -- fields carry shape suffixes too
    """Multiplied by the adapter's scale, like ``up_b_FR``."""
    up_b_FR: Tensor | None  # noqa: N815
    down_a_RF: Tensor | None  # noqa: N815


@dataclass(frozen=True, slots=True)
class GluInputs:
    """Outputs of the frozen linears [T, F], and ``x A^T`` [T, R] of their adapters."""

    gate_TF: Tensor  # noqa: N815
    up_TF: Tensor  # noqa: N815
    gate_low_TR: Tensor  # noqa: N815
    """Has no columns if the adapter is off, like ``up_low_TR``."""
    up_low_TR: Tensor  # noqa: N815


def adapted_glu_forward(
    inputs: GluInputs, adapters: GluAdapters, activation: str, out_TF: Tensor
) -> Tensor | None:
    """Write h to ``out_TF``; return ``h A^T`` [T, R] in float32, None without an adapter on down.

    All tensors are two-dimensional with dense rows at any stride, in one dtype. Sums are float32;
    a result depends neither on whether gradients are wanted nor on an order of execution.
    """
    if fused(inputs, adapters):
        from rlsloth.kernels.adapted_glu import triton

        low_TR = triton.forward(_tensors(inputs, adapters), activation, out_TF)
        increment_version(out_TF)  # autograd must notice the write, and cannot see into a kernel
        return low_TR
    lows = []
    for rows in _chunks(inputs, adapters):
        gate, up = _adapted(inputs, adapters, rows)
        h = glu_forward(gate, up, activation, out=out_TF[rows])
        if adapters.down_a_RF is not None:
            lows.append(_product(h, adapters.down_a_RF.t()))
    return torch.cat(lows) if lows else None


def adapted_glu_backward(
    d_out_TF: Tensor,
    d_low_TR: Tensor,
    inputs: GluInputs,
    adapters: GluAdapters,
    activation: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Overwrite gate and up with their gradients; return those of the factors in float32.

    Args:
        d_out_TF: the gradient of h through down's weight alone. It may be overwritten; without an
            adapter on down it is, by h.
        d_low_TR: the gradient of ``h A^T``; no columns if down's adapter is off.

    Returns:
        (dB_gate [F, R], dB_up [F, R], dA_down [R, F]), where B is ``gate_b_FR``: multiply by the
        adapter's scale for the gradient of its own B.
    """
    if fused(inputs, adapters):
        from rlsloth.kernels.adapted_glu import triton

        grads = triton.backward(d_out_TF, d_low_TR, _tensors(inputs, adapters), activation)
        increment_version((inputs.gate_TF, inputs.up_TF))
        return grads
    sums: list[Tensor | None] = [
        None if factor is None else factor.new_zeros(factor.shape, dtype=torch.float32)
        for factor in (adapters.gate_b_FR, adapters.up_b_FR, adapters.down_a_RF)
    ]
    for rows in _chunks(inputs, adapters):
        gate, up = _adapted(inputs, adapters, rows)
        d_h = _plus(d_out_TF[rows], d_low_TR[rows], adapters.down_a_RF)
        h, d_gate, d_up = glu_backward(d_h, gate, up, activation)
        if adapters.gate_b_FR is not None:
            inputs.gate_TF[rows].copy_(d_gate)
        if adapters.up_b_FR is not None:
            inputs.up_TF[rows].copy_(d_up)
        pairs = (
            (d_gate, inputs.gate_low_TR[rows]),
            (d_up, inputs.up_low_TR[rows]),
            (d_low_TR[rows], h),
        )
        for total, (left, right) in zip(sums, pairs, strict=True):
            if total is not None:
                total.add_(_product(left.t(), right))
    return sums[0], sums[1], sums[2]


def fused(inputs: GluInputs, adapters: GluAdapters) -> bool:
    """Whether one kernel does it all: 16 bits, all adapters on, ranks up to FUSED_RANK.

    That is on GPUs of compute capability 8.0 on.
    """
    gate_b, up_b, down_a = adapters.gate_b_FR, adapters.up_b_FR, adapters.down_a_RF
    if gate_b is None or up_b is None or down_a is None:
        return False
    # TRITON_INTERPRET is Triton's own switch: kernels then run on CPU tensors.
    runs = inputs.gate_TF.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    runs = runs and multiplies_in_triton(inputs.gate_TF)
    narrow = max(gate_b.shape[1], up_b.shape[1], down_a.shape[0]) <= FUSED_RANK
    return runs and narrow and inputs.gate_TF.dtype != torch.float32


def _tensors(
    inputs: GluInputs, adapters: GluAdapters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert adapters.gate_b_FR is not None
    assert adapters.up_b_FR is not None
    assert adapters.down_a_RF is not None
    return (
        inputs.gate_TF,
        inputs.up_TF,
        inputs.gate_low_TR,
        inputs.up_low_TR,
        adapters.gate_b_FR,
        adapters.up_b_FR,
        adapters.down_a_RF,
    )


def _chunks(inputs: GluInputs, adapters: GluAdapters) -> list[slice]:
    """Cut the rows into chunks, so that temporaries between the kernels stay small."""
    tokens = inputs.gate_TF.shape[0]
    none = adapters.gate_b_FR is adapters.up_b_FR is adapters.down_a_RF is None
    if none and inputs.gate_TF.is_cuda:  # one kernel; torch's own code makes float32 copies
        return [slice(0, tokens)]
    starts = range(0, max(tokens, 1), CHUNK_ROWS)
    return [slice(start, min(start + CHUNK_ROWS, tokens)) for start in starts]


def _adapted(inputs: GluInputs, adapters: GluAdapters, rows: slice) -> tuple[Tensor, Tensor]:
    """Add the adapters to gate and up: return copies, or the tensor itself without an adapter."""
    gate_b, up_b = adapters.gate_b_FR, adapters.up_b_FR
    return (
        _plus(
            inputs.gate_TF[rows], inputs.gate_low_TR[rows], None if gate_b is None else gate_b.t()
        ),
        _plus(inputs.up_TF[rows], inputs.up_low_TR[rows], None if up_b is None else up_b.t()),
    )


def _plus(base_TN: Tensor, low_TR: Tensor, factor_RN: Tensor | None) -> Tensor:
    if factor_RN is None:
        return base_TN
    # Contiguous: on CPUs with AMX, oneDNN also reads past the end of bf16 rows of an odd length,
    # and a NaN there, times zero, is NaN.
    return torch.addmm(base_TN, low_TR.contiguous(), factor_RN)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices, with a float32 result."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
