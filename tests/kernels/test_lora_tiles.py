"""The MLP in tiles of rows: the results of the whole MLP, with one tile in memory at a time."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.lora_layers import (
    BIASED_LEARNT,
    LEARNT,
    NF4,
    OFF,
    PLAIN,
    input_like,
    make_mlp,
    parameters,
)
from rlsloth.kernels.lora import mlp, mlp_tiles
from rlsloth.kernels.lora.op import lora_mlp
from rlsloth.kernels.measure import _peak_bytes_cpu

TOKENS = 600
KINDS = [
    (NF4, NF4, NF4), (PLAIN, PLAIN, PLAIN), (NF4, OFF, PLAIN), (LEARNT, LEARNT, BIASED_LEARNT),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "most", "sizes"),
    [(600, 256, [256, 256, 88]), (129, 128, [128, 1]), (128, 128, [128]), (1000, 500, [512, 488])],
)
def test_tiles_cover_all_rows_alike(tokens, most, sizes):
    made = mlp_tiles.tiles(tokens, most)
    assert [tile.stop - tile.start for tile in made] == sizes
    assert [row for tile in made for row in range(tile.start, tile.stop)] == list(range(tokens))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_tiled_is_untiled(kinds, recomputed):
    layers, x = make_mlp(kinds), input_like(TOKENS, 64)
    weight = torch.randn(TOKENS, 64, dtype=x.dtype)

    def run(rows):
        leaf = x.clone().requires_grad_()

        def compute(x):
            return lora_mlp(x, *layers, "silu", tile_rows=rows)

        y = checkpoint(compute, leaf, use_reentrant=False) if recomputed else compute(leaf)
        return y, torch.autograd.grad((y * weight).sum(), [leaf, *parameters(layers)])

    whole, grads = run(None)
    tiled, tiled_grads = run(256)
    torch.testing.assert_close(tiled, whole, rtol=1e-6, atol=1e-6)
    for got, want in zip(tiled_grads, grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    with torch.no_grad():
        assert torch.equal(lora_mlp(x, *layers, "silu", tile_rows=256), tiled)


def test_the_mlp_is_computed_once_more(monkeypatch):
    """Checkpointing's second forward stops before the tiles, which the backward computes."""
    calls = []

    def inner(x_TH, *rest):
        calls.append(len(x_TH))
        return mlp.inner(x_TH, *rest)

    monkeypatch.setattr(mlp_tiles, "inner", inner)
    layers, x = make_mlp((PLAIN, PLAIN, PLAIN)), input_like(TOKENS, 64).requires_grad_()
    y = checkpoint(lambda x: lora_mlp(x, *layers, "silu", tile_rows=256), x, use_reentrant=False)
    y.sum().backward()
    assert calls == [256, 256, 88] * 2


def test_one_tile_is_in_memory():
    layers = make_mlp((PLAIN, PLAIN, PLAIN))
    width = layers[0].weight.shape[0]

    def peak(tokens, rows):
        x = input_like(tokens, 64).requires_grad_()
        return _peak_bytes_cpu(
            lambda: lora_mlp(x, *layers, "silu", tile_rows=rows).sum().backward()
        )

    whole = peak(8192, None) - peak(4096, None)
    tiled = peak(8192, 128) - peak(4096, 128)
    # Of the width of the MLP: gate, up, and one more.
    assert whole - tiled > 4096 * 4 * 2.5 * width
