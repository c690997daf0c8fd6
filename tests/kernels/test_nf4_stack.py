"""kernels/nf4/stack: parameters keep their values, and one kernel gives the same products."""

from __future__ import annotations

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from helpers.nf4_stacks import check_one_product, check_parameters_stay, quantised
from rlsloth.kernels.nf4.op import Nf4Weight, _dequantize_torch, dequantize, nf4_matmul
from rlsloth.kernels.nf4.stack import can_stack, stack

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("nested", [True, False])
def test_the_parameters_stay_what_they_were(nested):
    check_parameters_stay("cpu", nested)


@pytest.mark.parametrize("rows", [1, 17, 200])
def test_one_product_is_all_products(rows):
    check_one_product("cpu", rows)


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
