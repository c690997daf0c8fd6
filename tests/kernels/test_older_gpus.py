"""Kernels in float16 on GPUs without bfloat16: they compile, and matrix products are left to torch.

They are compiled for Turing (7.5) and Volta (7.0) without a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlsloth.kernels import device

triton = pytest.importorskip("triton")

CAPABILITIES = (70, 75)


def _kernels() -> dict[str, tuple[Any, dict[str, Any], dict[str, str], int]]:
    """Name -> kernel, constants, types of pointers that are not float16, and warps."""
    from rlsloth.kernels.glu import triton as glu
    from rlsloth.kernels.host_rows import triton as host_rows
    from rlsloth.kernels.linear_logprob import triton_gradient as gradient
    from rlsloth.kernels.linear_logprob.tiles import HIDDEN_BLOCK
    from rlsloth.kernels.nf4 import triton_dequantize as nf4
    from rlsloth.kernels.rms_norm import triton as norm
    from rlsloth.kernels.rope import triton as rope

    tiling = norm._tiling(4096)
    norm_warps = tiling.pop("num_warps")
    floats = {"weight_ptr": "*fp32", "partial_ptr": "*fp32", "eps": "fp32", "offset": "fp32"}
    unit = {"ACTIVATION": "silu", "INTERPRETED": False}
    turn = {"Q_HEADS": 32, "Q_BLOCK": 32, "K_HEADS": 8, "K_BLOCK": 8, "DIM": 128, "HALF": 64}
    turn |= {"HALF_BLOCK": 64, "REST_BLOCK": 0, "INPLACE": True}
    packed = {"packed_ptr": "*u8", "absmax_ptr": "*u8", "code_ptr": "*fp32"}
    packed |= {"absmax2_ptr": "*fp32", "offset_ptr": "*fp32", "table_ptr": "*fp32"}
    blocks = {"ROW_GROUPS": 512, "SIZE": 64, "GROUPS": nf4.DEQUANTIZED_GROUPS, "NESTED": True}
    rows = {"table": "*fp16", "ids": "*i64", "out": "*fp16"}
    finish = {"target_ptr": "*i64", "stats_ptr": "*fp32", "sum_ptr": "*fp32", "ceiling": "fp32"}
    return {
        "norm": (norm._forward_kernel, tiling, floats, norm_warps),
        "norm, gradient": (
            norm._backward_kernel,
            tiling | {"STAGES": 1, "partial_ptr": None},
            floats,
            norm_warps,
        ),
        "glu": (glu._forward_kernel, unit | {"BLOCK": glu.FORWARD_BLOCK}, {}, glu.WARPS),
        "glu, gradient": (
            glu._backward_kernel,
            unit | {"BLOCK": glu.BACKWARD_BLOCK},
            {},
            glu.WARPS,
        ),
        "rope": (rope._rope_kernel, turn | {"BACKWARD": False}, {}, 4),
        "rope, gradient": (rope._rope_kernel, turn | {"BACKWARD": True}, {}, 4),
        "nf4": (nf4._dequantize_kernel, blocks | {"ROW_BLOCKS": 0}, packed, 8),
        "rows of the host": (host_rows._rows_kernel, {"BLOCK": 4096}, rows, 4),
        "log-probs": (
            gradient._finish_kernel,
            {"BLOCK": HIDDEN_BLOCK, "SOFTCAP": True},
            finish,
            4,
        ),
        "log-probs, rows": (
            gradient._scale_kernel,
            {"BLOCK": HIDDEN_BLOCK},
            {"scale_ptr": "*fp32"},
            4,
        ),
        "log-probs, all": (
            gradient._scale_all_kernel,
            {"BLOCK": gradient.SCALE_BLOCK},
            {"factor_ptr": "*fp32"},
            8,
        ),
    }


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", list(_kernels()))
def test_a_kernel_compiles(name: str, capability: int, tmp_path, monkeypatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants, types, warps = _kernels()[name]
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = {
        argument: "constexpr"
        if argument in constants
        else types.get(argument, "*fp16" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    built = compile(source, target=target, options={"num_warps": warps})
    assert f".target sm_{capability}" in built.asm["ptx"]
    assert built.metadata.shared <= 64 << 10  # what a block may take on Turing


@pytest.mark.parametrize(("major", "on"), [(7, False), (8, True), (9, True)])
def test_matrix_products_are_torchs_before_ampere(major: int, on: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    device._capability.cache_clear()
    there: Any = type("Elsewhere", (), {"is_cuda": True, "device": torch.device("cuda", 0)})()
    try:
        assert device.multiplies_in_triton(there) is on
        assert device.multiplies_in_triton(torch.zeros(1))  # in Triton's interpreter
    finally:
        device._capability.cache_clear()


def test_sizes_of_grids_are_tritons() -> None:
    for n in range(1, 70):
        assert device.next_power_of_2(n) == triton.next_power_of_2(n)
        for m in range(1, 9):
            assert device.cdiv(n, m) == triton.cdiv(n, m)
