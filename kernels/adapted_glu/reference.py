"""The gated unit between LoRA linears in plain torch, in any dtype: the reference for tests."""

from __future__ import annotations

from torch import Tensor

from rlsloth.kernels.glu.reference import glu_reference


def adapted_glu_reference(
    gate_TF: Tensor,
    up_TF: Tensor,
    gate_low_TR: Tensor,
    up_low_TR: Tensor,
    gate_b_FR: Tensor,
    up_b_FR: Tensor,
    down_a_RF: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """``h = act(gate + gate_low B^T) * (up + up_low B^T)`` and ``h A^T``."""
    h_TF = glu_reference(
        gate_TF + gate_low_TR @ gate_b_FR.t(), up_TF + up_low_TR @ up_b_FR.t(), activation
    )
    return h_TF, h_TF @ down_a_RF.t()
