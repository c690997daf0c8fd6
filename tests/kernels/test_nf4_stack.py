"""Several NF4 weights in one storage: the same parameters, and the same products by one kernel."""

from __future__ import annotations

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from rlsloth.kernels.nf4.op import Nf4Weight, _dequantize_torch, dequantize, nf4_matmul
from rlsloth.kernels.nf4.stack import can_stack, stack

bitsandbytes = pytest.importorskip("bitsandbytes")
WHERE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])])


def quantised(rows: int, columns: int, seed: int, device: str, nested: bool = True):
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


@WHERE
@pytest.mark.parametrize("nested", [True, False])
def test_the_parameters_stay_what_they_were(nested, device):
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


@WHERE
@pytest.mark.parametrize("rows", [1, 17, 200])
def test_one_product_is_all_products(rows, device):
    parameters = [quantised(r, 256, i, device) for i, r in enumerate((128, 64, 192))]
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(9)).bfloat16().to(device)
    apart = torch.cat([nf4_matmul(x, Nf4Weight.of(p)) for p in parameters], dim=-1)
    wanted = torch.cat([x.double() @ dequantize(Nf4Weight.of(p)).double().t() for p in parameters],
                       dim=-1)  # fmt: skip
    together = nf4_matmul(x, stack(parameters))
    error = (together.double() - wanted).abs().max() / wanted.abs().max()
    assert error < 0.01
    torch.testing.assert_close(together, apart, rtol=0.02, atol=0.02 * float(apart.abs().max()))


def test_parts_of_nested_blocks_do_not_stack():
    weights = [Nf4Weight.of(quantised(r, 64, i, "cpu")) for i, r in enumerate((130, 64))]
    assert not can_stack(weights)
    assert can_stack(weights[:1])
    other = Nf4Weight.of(quantised(64, 128, 0, "cpu"))
    assert not can_stack([weights[1], other])


def agree() -> None:
    parameters = [quantised(r, 256, i, "cpu") for i, r in enumerate((128, 64))]
    apart = torch.cat([dequantize(Nf4Weight.of(p)) for p in parameters])
    whole = stack(parameters)
    assert torch.equal(dequantize(whole), apart)
    x = torch.randn(3, 256).bfloat16()
    wanted = x.double() @ _dequantize_torch(whole).double().t()
    assert (nf4_matmul(x, whole).double() - wanted).abs().max() / wanted.abs().max() < 0.01
    print(AGREED)


def test_the_kernels_read_an_offset_for_each_row():
    check_interpreted(__file__)


if __name__ == "__main__":
    agree()
