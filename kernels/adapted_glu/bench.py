"""Bench the gated unit with adapters against a copy of the bytes that the unit alone must move.

The error is the largest one of h, relative to the largest h, on the first tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlsloth.kernels.adapted_glu.op import (
    GluAdapters,
    GluInputs,
    adapted_glu_backward,
    adapted_glu_forward,
)
from rlsloth.kernels.adapted_glu.reference import adapted_glu_reference
from rlsloth.kernels.measure import Case, copy_of, normal

SHAPES = {"cuda": (8192, 14336, 32), "cpu": (48, 96, 16)}
CHECKED_TOKENS = 64


def cases(device: torch.device) -> Iterator[Case]:
    """Yield forward and backward cases, strided as in an MLP.

    Gate and the gradient that comes back from down lie in longer rows.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, width, rank = SHAPES[device.type]
    gate_wide, back_wide = (
        normal(tokens, width + more, device=device, dtype=dtype) for more in (2 * rank, rank)
    )
    low_TR = gate_wide[:, width:]
    up_TF = normal(tokens, width, device=device, dtype=dtype)
    inputs = GluInputs(gate_wide[:, :width], up_TF, low_TR[:, :rank], low_TR[:, rank:])
    gate_b, up_b, down_a = (
        normal(*shape, device=device, dtype=dtype, scale=0.1 * rank**-0.5)
        for shape in ((width, rank), (width, rank), (rank, width))
    )
    adapters = GluAdapters(gate_b, up_b, down_a)
    out_TF = torch.empty_like(up_TF)

    def error() -> float:
        given = (inputs.gate_TF, inputs.up_TF, inputs.gate_low_TR, inputs.up_low_TR)
        tensors = [x[:CHECKED_TOKENS] for x in given]
        gate, up, gate_low, up_low = (x.double() for x in tensors)
        factors = gate_b.double(), up_b.double(), down_a.double()
        wanted_TF, _ = adapted_glu_reference(gate, up, gate_low, up_low, *factors, "silu")
        actual_TF = torch.empty_like(up_TF[:CHECKED_TOKENS])
        adapted_glu_forward(GluInputs(*tensors), adapters, "silu", actual_TF)
        return float((actual_TF - wanted_TF).abs().max() / wanted_TF.abs().max())

    shape = f"T {tokens} F {width} r {rank}"
    yield Case(
        "adapted_glu",
        f"forward, {shape}",
        lambda: adapted_glu_forward(inputs, adapters, "silu", out_TF),
        copy_of(3 * up_TF.nbytes, device),
        "copy of 3 gates",
        error=error,
    )
    # This overwrites its inputs each time, so the values drift; the bytes moved do not.
    yield Case(
        "adapted_glu",
        f"backward, {shape}",
        lambda: adapted_glu_backward(
            back_wide[:, :width], back_wide[:, width:], inputs, adapters, "silu"
        ),
        copy_of(5 * up_TF.nbytes, device),
        "copy of 5 gates",
    )
