"""kernels/host_rows: rows of a table by torch, and by the Triton kernel interpreted."""

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from rlsloth.kernels.host_rows.op import host_rows


def test_rows():
    table, ids = torch.randn(11, 6), torch.tensor([[3, 0, 10], [3, 3, 1]])
    assert torch.equal(host_rows(table, ids), table[ids])


def check_triton_in_interpreter():
    from rlsloth.kernels.host_rows.triton import read_rows

    for width in (1, 48, 128):
        table, ids = torch.randn(11, width), torch.tensor([3, 0, 10, 3])
        out = torch.empty(4, width)
        read_rows(table, ids, out)
        assert torch.equal(out, table[ids])
    print(AGREED)


@pytest.mark.slow
def test_triton_kernel_in_its_interpreter():
    check_interpreted(__file__)


if __name__ == "__main__":
    check_triton_in_interpreter()
