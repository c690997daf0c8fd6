"""kernels/rms_norm, rope and glu on a CUDA GPU: the compiled Triton kernels at real sizes."""

import pytest
import torch

from rlsloth.kernels.glu import bench as glu_bench
from rlsloth.kernels.glu.op import ACTIVATIONS, glu, glu_backward, glu_forward
from rlsloth.kernels.glu.reference import glu_reference
from rlsloth.kernels.rms_norm import bench as rms_norm_bench
from rlsloth.kernels.rms_norm.op import add_rms_norm, rms_norm
from rlsloth.kernels.rms_norm.reference import rms_norm_reference
from rlsloth.kernels.rope import bench as rope_bench
from rlsloth.kernels.rope.op import rope
from rlsloth.kernels.rope.reference import rope_reference

EPS = 1e-6
BF16, FP32 = torch.bfloat16, torch.float32
ROUNDING = {BF16: 4e-3, FP32: 1e-5}  # half a unit in the last place of bfloat16 is 2e-3
NORMS = [
    (8192, 4096, BF16),
    (8192, 2048, BF16),
    (8192 * 8 + 3, 128, BF16),
    (1001, 5120, BF16),
    (64, 16384, BF16),
    (1000, 4096, FP32),
    (1001, 100, FP32),
    (5, 32768, FP32),
]
ROPES = [
    (2, 1024, 32, 8, 128, 128, BF16),
    (1, 1001, 28, 4, 128, 128, BF16),
    (3, 100, 9, 3, 80, 32, FP32),
]
GLUS = [(2, 2048, 14336, BF16), (1001, 18944, BF16), (77, 1001, FP32)]


def randn(*shape, dtype=FP32, count=1):
    generator = torch.Generator("cuda").manual_seed(0)
    made = [torch.randn(*shape, device="cuda", generator=generator).to(dtype) for _ in range(count)]
    return made if count > 1 else made[0]


def wide(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def close(actual, wanted, dtype):
    assert actual.dtype == dtype
    tolerance = ROUNDING[dtype]
    scale = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance * scale / 4)


@pytest.mark.parametrize(("rows", "width", "dtype"), NORMS)
def test_rms_norm_equals_float64(rows, width, dtype):
    x, residual, grad, grad_total = randn(rows, width, dtype=dtype, count=4)
    weight = 0.3 * randn(width)  # float32, also with bfloat16 inputs
    doubles = wide(x, weight)
    wanted = rms_norm_reference(*doubles, EPS, 1.0)
    wanted_grads = torch.autograd.grad(wanted, doubles, grad.double())
    floats = leaves(x, weight)
    y = rms_norm(*floats, EPS, 1.0)
    close(y, wanted, dtype)
    grads = torch.autograd.grad(y, floats, grad)
    close(grads[0], wanted_grads[0], dtype)
    close(grads[1], wanted_grads[1], FP32)

    total = x + residual
    doubles = wide(total)
    wanted = rms_norm_reference(*doubles, weight.double(), EPS, 1.0)
    wanted_grad = torch.autograd.grad(wanted, doubles, grad.double())[0] + grad_total.double()
    floats = leaves(x, residual)
    outputs = add_rms_norm(*floats, weight, EPS, 1.0)
    assert torch.equal(outputs[1], total)
    close(outputs[0], wanted, dtype)
    grads = torch.autograd.grad(outputs, floats, (grad, grad_total))
    close(grads[0], wanted_grad, dtype)
    assert torch.equal(*grads)


def test_add_rms_norm_trains_its_weight_and_takes_either_gradient():
    x, residual, grad = randn(3000, 1024, dtype=BF16, count=3)
    inputs = leaves(x, residual, randn(1024, dtype=BF16))
    normed, total = add_rms_norm(*inputs, EPS)
    doubles = wide(total, inputs[2])
    wanted = torch.autograd.grad(
        rms_norm_reference(*doubles, EPS), doubles, grad.double(), retain_graph=True
    )
    actual = torch.autograd.grad(normed, inputs, grad, retain_graph=True)
    close(actual[0], wanted[0], BF16)
    close(actual[2], wanted[1], BF16)
    both = torch.autograd.grad((normed, total), inputs, (grad, grad), retain_graph=True)
    close(both[0], wanted[0] + grad.double(), BF16)
    assert torch.equal(both[2], actual[2])
    assert torch.equal(torch.autograd.grad(total, inputs[:2], grad)[1], grad)


def test_weight_gradient_is_deterministic():
    x, grad = randn(20001, 1536, dtype=BF16, count=2)
    weight = torch.ones(1536, device="cuda", dtype=BF16, requires_grad=True)
    runs = [torch.autograd.grad(rms_norm(x, weight, EPS), weight, grad)[0] for _ in range(5)]
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.parametrize("shape", ROPES)
def test_rope_equals_float64(shape):
    batch, tokens, heads, key_heads, dim, rotary, dtype = shape
    q, grad_q = randn(batch, tokens, heads, dim, dtype=dtype, count=2)
    k, grad_k = randn(batch, tokens, key_heads, dim, dtype=dtype, count=2)
    cos, sin = rope_bench.tables(tokens, rotary, q.device, dtype)
    doubles = wide(q, k)
    wanted = rope_reference(*doubles, cos.double(), sin.double())
    wanted_grads = torch.autograd.grad(wanted, doubles, (grad_q.double(), grad_k.double()))
    for inplace in (False, True):
        # In place on parts of one projection, with a gradient in attention's layout.
        fused = torch.cat((q, k), 2).requires_grad_()
        parts = (fused * 1).split((heads, key_heads), 2)
        outputs = rope(*parts, cos, sin, inplace=inplace)
        for actual, expected in zip(outputs, wanted, strict=True):
            close(actual, expected, dtype)
        grads = grad_q.transpose(1, 2).contiguous().transpose(1, 2), grad_k
        (grad,) = torch.autograd.grad(outputs, fused, grads)
        close(grad, torch.cat(wanted_grads, 2), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", GLUS)
def test_glu_equals_float64(shape, activation):
    *shape, dtype = shape
    gate, up, d_out = (2 * x for x in randn(*shape, dtype=dtype, count=3))
    doubles = wide(gate, up)
    wanted = glu_reference(*doubles, activation)
    wanted_grads = torch.autograd.grad(wanted, doubles, d_out.double())
    inputs = leaves(gate, up)
    h = glu(*inputs, activation)
    close(h, wanted, dtype)
    for actual, expected in zip(torch.autograd.grad(h, inputs, d_out), wanted_grads, strict=True):
        close(actual, expected, dtype)
    fused = torch.cat((gate, up), -1)
    one, two = fused.chunk(2, -1)
    assert torch.equal(glu_forward(one, two, activation), h)
    for actual, expected in zip(
        glu_backward(d_out, one, two, activation), (wanted, *wanted_grads), strict=True
    ):
        close(actual, expected, dtype)


def test_extreme_gates():
    gate = torch.tensor([1e30, -1e30, 100.0, -100.0, 0.0], device="cuda")
    for activation in ACTIVATIONS:
        inputs = leaves(gate, torch.ones_like(gate))
        h = glu(*inputs, activation)
        grads = torch.autograd.grad(h, inputs, torch.ones_like(gate))
        torch.testing.assert_close(h, gate.clamp(min=0))
        torch.testing.assert_close(grads[0], torch.tensor([1, 0, 1, 0, 0.5], device="cuda"))
        torch.testing.assert_close(grads[1], gate.clamp(min=0))


def test_more_than_two_to_the_31_elements():
    """The last rows of tensors of 4 GiB and more equal those of the same rows alone."""
    rows = 2**31 // 4096 + 5
    x = torch.empty(rows, 4096, device="cuda", dtype=BF16).normal_()
    weight = torch.ones(4096, device="cuda", dtype=BF16)
    few = x[-64:].clone()
    assert torch.equal(rms_norm(x, weight, EPS)[-64:], rms_norm(few, weight, EPS))
    leaf, few_leaf = x.requires_grad_(), few.clone().requires_grad_()
    (grad,) = torch.autograd.grad(rms_norm(leaf, weight, EPS), leaf, x.detach())
    (wanted,) = torch.autograd.grad(rms_norm(few_leaf, weight, EPS), few_leaf, few)
    assert torch.equal(grad[-64:], wanted)
    x = x.detach()
    del leaf, grad
    wanted_3 = glu_backward(few.clone(), few.clone(), few.clone(), "silu")
    results = glu_backward(x.clone(), x.clone(), x.clone(), "silu")
    for actual, expected in zip(results, wanted_3, strict=True):
        assert torch.equal(actual[-64:], expected)
    del results
    q, k = x.view(1, rows, 32, 128), x[:, :128].view(1, rows, 1, 128)
    cos, sin = rope_bench.tables(rows, 128, x.device, BF16)
    wanted, _ = rope(q[:, -64:], k[:, -64:], cos[:, -64:], sin[:, -64:])
    assert torch.equal(rope(q, k, cos, sin)[0][:, -64:], wanted)
    q, _ = rope(q, k.clone(), cos, sin, inplace=True)
    assert torch.equal(q[:, -64:], wanted)


def test_nothing_waits_for_the_device():
    x, residual = leaves(*randn(512, 1024, dtype=BF16, count=2))
    weight = torch.ones(1024, device="cuda", dtype=BF16, requires_grad=True)
    cos, sin = rope_bench.tables(512, 128, x.device, BF16)

    def layer():
        normed, total = add_rms_norm(x, residual, weight, EPS)
        q, k = (rms_norm(y, weight, EPS).view(1, 512, 8, 128) for y in (normed, total))
        q, k = rope(q, k, cos, sin, inplace=True)
        glu(q, k, "gelu_tanh").sum().backward()

    layer()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bench", [rms_norm_bench, rope_bench, glu_bench])
def test_bench_cases_run(bench):
    for case in bench.cases(torch.device("cuda")):
        case.ours()
        assert case.error is None or case.error() < ROUNDING[BF16]
