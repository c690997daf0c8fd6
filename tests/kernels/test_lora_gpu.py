"""kernels/lora on a CUDA GPU: cuBLAS products, the side stream, checkpointing, CUDA graphs."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rlsloth.kernels.lora.bench_layer import Sizes, both_ways, error, forward, make_layer
from rlsloth.kernels.lora.op import lora_linears, lora_mlp
from rlsloth.kernels.nf4.op import dequantize

SMALL = Sizes(tokens=300, hidden=512, heads=8, key_heads=2, dim=64, width=1408, rank=16)
ODD = Sizes(tokens=77, hidden=192, heads=3, key_heads=1, dim=64, width=320, rank=3)
LARGE = Sizes(tokens=2048, hidden=4096, heads=32, key_heads=8, dim=128, width=14336, rank=32)


def make(sizes, dtype=torch.bfloat16, nf4=True, adapter=None):
    torch.manual_seed(0)
    layer = make_layer(sizes, torch.device("cuda"), dtype)
    linears = {}
    for name, linear in layer.linears.items():
        a, b = (x.detach().to(adapter or dtype) for x in (linear.lora_a, linear.lora_b))
        linears[name] = replace(
            linear,
            weight=linear.weight if nf4 else dequantize(linear.weight),
            lora_a=a.requires_grad_(),
            lora_b=b.requires_grad_(),
        )
    return replace(layer, linears=linears)


def mlp_of(layer):
    linears = [layer.linears[name] for name in ("gate", "up", "down")]
    return lambda x: lora_mlp(x, *linears, "silu")


@pytest.mark.parametrize("adapter", [None, torch.float32])
@pytest.mark.parametrize("sizes", [SMALL, ODD, replace(SMALL, rank=1), replace(LARGE, tokens=512)])
def test_layer_equals_float64(sizes, adapter):
    # The largest of 18 tensors' rms errors, after up to five roundings to bfloat16.
    assert error(make(sizes, adapter=adapter)) < 2e-2


@pytest.mark.parametrize("sizes", [SMALL, ODD])
def test_layer_equals_float64_in_float32(sizes):
    assert error(make(sizes, torch.float32)) < 1e-5


def test_plain_weights_give_what_nf4_gives():
    results = []
    for nf4 in (True, False):
        layer = make(SMALL, nf4=nf4)
        results.append(both_ways(forward, layer, layer.leaves())())
    for one, other in zip(*results, strict=True):
        difference = (one - other).float().square().mean() / one.float().square().mean()
        assert difference.sqrt().item() < 2e-2


def test_the_side_stream_is_free_of_races():
    layer = make(LARGE)
    run = both_ways(forward, layer, layer.leaves())
    first: Any = run()
    for _ in range(5):
        # Two calls without waiting for the device: the second reuses the buffers of the first.
        run()
        assert all(torch.equal(*pair) for pair in zip(first, cast(Any, run()), strict=True))


def test_two_streams_do_not_share_buffers():
    layer = make(replace(LARGE, tokens=512))
    run = both_ways(forward, layer, layer.leaves())
    first: Any = run()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run())
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(*pair) for pair in zip(first, cast(Any, result), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    layer = make(SMALL)
    names = [layer.linears[name] for name in "qkv"]

    def run(x):
        q, k, v = lora_linears(x, tuple(names))
        return mlp_of(layer)(x) + q + (k + v).repeat(1, 1, 4)

    gradient = layer.grads[0]
    wanted = torch.autograd.grad(run(layer.x), layer.x, gradient)[0]
    x = layer.x.detach().requires_grad_()
    checkpoint(run, x, use_reentrant=reentrant).backward(gradient)
    assert torch.equal(x.grad, wanted)


def test_with_and_without_gradient_bitwise_the_same():
    layer = make(SMALL)
    names = tuple(layer.linears[name] for name in "qkv")
    with torch.no_grad():
        old = [mlp_of(layer)(layer.x), *lora_linears(layer.x, names)]
    new = [mlp_of(layer)(layer.x), *lora_linears(layer.x, names)]
    assert all(torch.equal(*pair) for pair in zip(old, new, strict=True))


def test_decoding_agrees_and_is_captured():
    layer = make(SMALL)
    names = tuple(layer.linears[name] for name in "qkv")
    x = layer.x.detach()[:, :40].clone()

    def run():
        return [mlp_of(layer)(x), *lora_linears(x, names)]

    trained = run()
    with torch.no_grad():
        decoded = run()
        for one, other in zip(trained, decoded, strict=True):
            difference = (one - other).float().square().mean() / one.float().square().mean()
            assert difference.sqrt().item() < 1e-2
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        x.normal_()
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, run(), strict=True))


def test_nothing_waits_for_the_device():
    layer = make(SMALL)
    run = both_ways(forward, layer, layer.leaves())
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        with torch.no_grad():
            mlp_of(layer)(layer.x[:, :8])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_an_mlp():
    """The peak above inputs and adapters is x with its room, gate, up, one more, then dy and dx."""
    layer = make(LARGE)
    run, x = mlp_of(layer), layer.x
    leaves = [x, *(p for name in ("gate", "up", "down") for p in _adapter(layer, name))]

    def both():
        torch.autograd.grad(run(x), leaves, layer.grads[0])

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    wide = 2 * LARGE.tokens * (LARGE.width + 64)
    narrow = 2 * LARGE.tokens * (LARGE.hidden + 64)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 3 * wide + 4 * narrow + 2**24


def _adapter(layer, name):
    return layer.linears[name].lora_a, layer.linears[name].lora_b
