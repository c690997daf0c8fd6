"""NF4 weights in one storage, checked on any device."""

from __future__ import annotations

import bitsandbytes
import torch

from rlsloth.kernels.nf4.op import Nf4Weight, dequantize, nf4_matmul
from rlsloth.kernels.nf4.stack import can_stack, stack


def quantised(
    rows: int, columns: int, seed: int, device: str, nested: bool = True
) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * (seed + 1)
    linear = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=False, quant_type="nf4", compress_statistics=nested,
        compute_dtype=torch.bfloat16,
    )  # fmt: skip
    linear.weight = bitsandbytes.nn.Params4bit(
        matrix.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    return linear.to(device).weight


def check_parameters_stay(device: str, nested: bool) -> None:
    parameters = [quantised(r, 256, i, device, nested) for i, r in enumerate((128, 64, 192))]
    before = [dequantize(Nf4Weight.of(p)) for p in parameters]
    assert can_stack([Nf4Weight.of(p) for p in parameters])
    whole = stack(parameters)
    assert whole.shape == (384, 256)
    assert torch.equal(dequantize(whole), torch.cat(before))
    first = whole.packed_B.untyped_storage().data_ptr()
    for parameter, matrix in zip(parameters, before, strict=True):
        weight = Nf4Weight.of(parameter)
        assert torch.equal(dequantize(weight), matrix)
        assert weight.packed_B.untyped_storage().data_ptr() == first


def check_one_product(device: str, rows: int) -> None:
    """One product with the stack equals the products with each of its parts."""
    parameters = [quantised(r, 256, i, device) for i, r in enumerate((128, 64, 192))]
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(9)).bfloat16().to(device)
    apart = torch.cat([nf4_matmul(x, Nf4Weight.of(p)) for p in parameters], dim=-1)
    wanted = torch.cat([x.double() @ dequantize(Nf4Weight.of(p)).double().t() for p in parameters],
                       dim=-1)  # fmt: skip
    together = nf4_matmul(x, stack(parameters))
    error = (together.double() - wanted).abs().max() / wanted.abs().max()
    assert error < 0.01
    torch.testing.assert_close(together, apart, rtol=0.02, atol=0.02 * float(apart.abs().max()))
