"""kernels/nf4 on a CUDA GPU: the compiled kernels, the side stream, CUDA graphs."""

import dataclasses

import pytest
import torch

from rlsloth.kernels.nf4.ahead import Job, dequantize_ahead
from rlsloth.kernels.nf4.op import Nf4Weight, dequantize, nf4_matmul
from rlsloth.kernels.nf4.reference import absmax_reference, dequantize_reference

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (130, 192), (7, 64)]
# Rows of 9 blocks (SmolLM2) and 14 (Qwen2.5-0.5B) are not whole words of four absmax codes.
ODD = [(576, 576), (192, 576), (4864, 896), (132, 64), (64, 64 * 700)]


def make(out, into, dtype=torch.bfloat16, nested=True, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    blocks = -(-out * into // 64)

    def integers(count):
        return torch.randint(
            0, 256, (count,), dtype=torch.uint8, device="cuda", generator=generator
        )

    def uniform(count):
        return torch.rand(count, device="cuda", generator=generator) + 0.5

    packed, shape = integers(-(-out * into // 2)), (out, into)
    if not nested:
        return Nf4Weight(packed, uniform(blocks), None, None, None, shape, dtype)
    table = torch.linspace(-1, 1, 256, device="cuda")
    offset = torch.tensor(2.6, device="cuda")
    return Nf4Weight(
        packed, integers(blocks), table, uniform(-(-blocks // 256)), offset, shape, dtype
    )


def exact(weight, dtype):
    absmax = weight.absmax.to(dtype)
    if weight.code_256 is not None:
        parts = (x.to(dtype) for x in (weight.code_256, weight.absmax2, weight.offset))
        absmax = absmax_reference(weight.absmax, *parts)
    return dequantize_reference(weight.packed_B, absmax, weight.shape, 64, dtype)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES[:2], (130, 192), (3, 70), (5, 7), (301, 64)])
def test_dequantises_bitwise(shape, dtype, nested):
    weight = make(*shape, dtype, nested)
    wanted = exact(weight, torch.float32).to(dtype)
    assert torch.equal(dequantize(weight), wanted)
    room = torch.full((shape[0], shape[1] + 8), float("nan"), dtype=dtype, device="cuda")
    dequantize(weight, room[:, : shape[1]])
    assert torch.equal(room[:, : shape[1]], wanted)
    assert room[:, shape[1] :].isnan().all()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitwise_equal_to_bitsandbytes(dtype, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = torch.randn(1024, 4096, device="cuda").to(dtype)
    packed, state = functional.quantize_4bit(
        matrix, blocksize=64, quant_type="nf4", compress_statistics=nested
    )

    class Parameter:
        data, quant_state = packed, state

    assert torch.equal(
        dequantize(Nf4Weight.of(Parameter)), functional.dequantize_4bit(packed, state)
    )


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 128, 200, 256])
@pytest.mark.parametrize("shape", SHAPES + ODD)
def test_product_equals_float64(shape, rows, nested):
    weight = make(*shape, nested=nested)
    x = torch.randn(rows, shape[1], device="cuda").bfloat16()
    wanted = x.double() @ exact(weight, torch.float64).t()
    y = nf4_matmul(x, weight)
    error = y.double() - wanted
    if wanted.numel() < 1000:  # too few for a mean
        assert (error.abs().max() / wanted.abs().max()).item() < 1e-2
    else:
        # The rounding of the output (1.6e-3) and of the code values (6.3e-4).
        assert (error.square().mean() / wanted.square().mean()).sqrt().item() < 3e-3
    assert torch.equal(y, nf4_matmul(x, weight))


def shifted(tensor, by):
    """Return a copy that begins ``by`` elements after an aligned address."""
    room = tensor.new_empty(tensor.numel() + by)
    return room[by:].copy_(tensor.flatten()).view(tensor.shape)


@pytest.mark.parametrize("by", [1, 4])
@pytest.mark.parametrize("moved", ["x", "packed_B", "absmax"])
@pytest.mark.parametrize("nested", [True, False])
def test_product_of_unaligned_storage(nested, moved, by):
    weight = make(1024, 512, nested=nested)
    x = torch.randn(1, 512, device="cuda").bfloat16()
    wanted = x.double() @ exact(weight, torch.float64).t()
    if moved == "x":
        x = shifted(x, by)
    else:
        weight = dataclasses.replace(weight, **{moved: shifted(getattr(weight, moved), by)})
    error = nf4_matmul(x, weight).double() - wanted
    assert (error.square().mean() / wanted.square().mean()).sqrt().item() < 3e-3


def test_product_without_bfloat16():
    for dtype in (torch.float32, torch.float16):
        weight = make(512, 256, dtype)
        x = torch.randn(5, 256, device="cuda").to(dtype)
        wanted = x.double() @ exact(weight, torch.float64).t()
        error = (nf4_matmul(x, weight).double() - wanted).abs().max() / wanted.abs().max()
        assert error.item() < 4 * torch.finfo(dtype).eps + 1e-5


def test_ahead_is_free_of_races():
    """Many long products of weights of several sizes each equal the product computed alone."""
    several = [make(*shape, seed=i) for i, shape in enumerate(SHAPES[:4] * 2)]
    for weights in (several[:3], several[3:6], several[5:7], several[:1], several):
        _check_races(weights)


def _check_races(weights):
    wanted = [dequantize(weight) for weight in weights]
    x = {into: torch.randn(4096, into, device="cuda").bfloat16() for into in (4096, 14336)}
    products = [x[matrix.shape[1]] @ matrix.t() for matrix in wanted]
    for _ in range(5):
        matrices = dequantize_ahead([Job(weight) for weight in weights])
        for matrix, product in zip(matrices, products, strict=True):
            assert torch.equal(x[matrix.shape[1]] @ matrix.t(), product)
        # The host does not wait for the device in between.
        matrices = dequantize_ahead([Job(weight) for weight in weights])
        results = [x[matrix.shape[1]] @ matrix.t() for matrix in matrices]
        assert all(torch.equal(*pair) for pair in zip(results, products, strict=True))
        # Interrupted: the next use must wait for the writes still in flight.
        left = dequantize_ahead([Job(weight) for weight in weights])
        next(left)
        next(left, None)
        del left


def test_ahead_and_product_in_a_cuda_graph():
    weights = [make(512, 256, seed=i) for i in range(3)]
    x = torch.randn(32, 256, device="cuda").bfloat16()

    def run():
        large = [x @ matrix.t() for matrix in dequantize_ahead([Job(w) for w in weights])]
        return large + [nf4_matmul(x, weight) for weight in weights]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.normal_()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, run(), strict=True))
