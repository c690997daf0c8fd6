"""Weights in FP8 and four bits: layouts bit by bit, and errors of rounding."""

from __future__ import annotations

import pytest
import torch

from rlsloth.exports.compressed.weights import (
    FP8_MAX,
    dequantised,
    fp8,
    int4,
    nearest_codes,
    pack,
    plain_scales,
    searched_scales,
    unpack,
)


def random(rows: int = 6, columns: int = 256) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight.bfloat16().float()


def test_the_first_code_is_in_the_lowest_bits() -> None:
    codes = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]])
    assert pack(codes).tolist() == [[0xFEA98710 - 2**32]]
    assert pack(codes).dtype == torch.int32
    assert unpack(pack(codes)).tolist() == codes.tolist()


def test_every_code_survives_at_every_place() -> None:
    codes = torch.stack([torch.arange(-8, 8).roll(i) for i in range(16)])
    assert torch.equal(unpack(pack(codes)).long(), codes)


def test_tensors_of_four_bits() -> None:
    weight = random()
    parts = int4(weight, 64, torch.bfloat16)
    assert {end: (tuple(t.shape), t.dtype) for end, t in parts.items()} == {
        "weight_packed": ((6, 32), torch.int32),
        "weight_scale": ((6, 4), torch.bfloat16),
        "weight_shape": ((2,), torch.int64),
    }
    assert parts["weight_shape"].tolist() == [6, 256]
    codes = unpack(parts["weight_packed"]).view(6, 4, 64)
    want = codes * parts["weight_scale"].float()[..., None]
    assert torch.equal(dequantised(parts), want.view(6, 256))
    # The codes are the nearest ones to the scales as they are stored.
    assert torch.equal(
        codes.float(), nearest_codes(weight.view(6, 4, 64), parts["weight_scale"].float())
    )


def test_values_that_four_bits_hold_are_unchanged() -> None:
    codes = torch.randint(-8, 8, (4, 128), generator=torch.Generator().manual_seed(0))
    codes[:, ::64] = 7
    codes[:, 1::64] = -8  # the group's largest weight, 8 steps: 16 / 15 of the plain scale
    weight = codes * 0.25
    parts = int4(weight, 64, torch.float32)
    assert (dequantised(parts) - weight).abs().max() <= 0.25 * 0.1
    exact = torch.full((4, 2), 0.25)
    assert torch.equal(nearest_codes(weight.view(4, 2, 64), exact).view(4, 128), codes.float())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_searched_scales_are_never_worse_than_plain_ones(group: int) -> None:
    groups = random(64).view(64, -1, group)
    groups[0, 0, 0] = 40.0  # a weight far beyond its group is kept rather than clipped

    def errors(scales: torch.Tensor) -> torch.Tensor:
        scales = scales.bfloat16().float()
        rounded = nearest_codes(groups, scales) * scales[..., None]
        return (rounded - groups).square().sum(-1)

    plain, found = errors(plain_scales(groups)), errors(searched_scales(groups, torch.bfloat16))
    assert (found <= plain).all()
    assert found.sum() < 0.9 * plain.sum()
    scale = float(searched_scales(groups, torch.bfloat16)[0, 0])
    assert abs(float(nearest_codes(groups, torch.tensor(scale))[0, 0, 0]) * scale - 40) < 3


def test_rows_of_zeros() -> None:
    for parts in (int4(torch.zeros(2, 64), 32, torch.bfloat16), fp8(torch.zeros(2, 64))):
        assert (parts["weight_scale"] > 0).all()
        assert torch.equal(dequantised(parts), torch.zeros(2, 64))


def test_tensors_of_fp8() -> None:
    weight = random()
    parts = fp8(weight)
    assert {end: (tuple(t.shape), t.dtype) for end, t in parts.items()} == {
        "weight": ((6, 256), torch.float8_e4m3fn),
        "weight_scale": ((6, 1), torch.float32),
    }
    assert (parts["weight"].float().abs().amax(1) == FP8_MAX).all()
    # Three bits after the leading one: at most half of an eighth.
    error = (dequantised(parts) - weight).abs()
    assert (error <= weight.abs() / 16 + parts["weight_scale"] * 2**-10).all()
