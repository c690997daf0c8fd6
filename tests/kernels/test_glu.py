"""kernels/glu on a CPU: the torch path, and the Triton kernels interpreted and compiled."""

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from rlsloth.kernels.glu.bench import cases
from rlsloth.kernels.glu.op import ACTIVATIONS, glu, glu_backward, glu_forward
from rlsloth.kernels.glu.reference import glu_reference

pytestmark = pytest.mark.slow

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(1,), (1, 1), (7, 97), (2, 3, 1024), (3, 1025), (2, 5000)]


def make(*shape, dtype=torch.float32):
    """Make gate, up and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    return [(2 * torch.randn(*shape, generator=generator)).to(dtype) for _ in range(3)]


def close(actual, wanted, dtype):
    assert actual.dtype == dtype
    tolerance = ROUNDING[dtype]
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


def expected(gate, up, d_out, activation):
    """Return the float64 result, then the gradients of gate and up."""
    wide = [x.detach().double().requires_grad_() for x in (gate, up)]
    h = glu_reference(*wide, activation)
    return h.detach(), *torch.autograd.grad(h, wide, d_out.double())


def check(gate, up, d_out, activation):
    """Check one call and its gradients against float64."""
    wanted = expected(gate, up, d_out, activation)
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    h = glu(*leaves, activation)
    assert h.is_contiguous()
    actual = h, *torch.autograd.grad(h, leaves, d_out)
    for one, other in zip(actual, wanted, strict=True):
        close(one, other, gate.dtype)


def check_raw(gate, up, d_out, activation):
    """Check the in-place functions without autograd against float64."""
    wanted = expected(gate, up, d_out, activation)
    close(glu_forward(gate, up, activation), wanted[0], gate.dtype)
    out = torch.full_like(gate, float("nan"))
    assert glu_forward(gate, up, activation, out=out) is out
    close(out, wanted[0], gate.dtype)
    results = glu_backward(d_out, gate, up, activation)
    assert all(x is y for x, y in zip(results, (d_out, gate, up), strict=True))
    for one, other in zip(results, wanted, strict=True):
        close(one, other, gate.dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(shape, activation):
    inputs = make(*shape)
    check(*inputs, activation)
    check_raw(*inputs, activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sixteen_bits(dtype, activation):
    inputs = make(5, 200, dtype=dtype)
    check(*inputs, activation)
    check_raw(*inputs, activation)


def test_is_rounded_once():
    gate, up, _ = make(64, 256, dtype=torch.bfloat16)
    for activation in ACTIVATIONS:
        wanted = glu_reference(gate.float(), up.float(), activation).to(torch.bfloat16)
        assert torch.equal(glu(gate, up, activation), wanted)


def check_extreme_values(largest=1e4):
    gates = torch.tensor([0.0, -0.0, 1e-30, 5.0, -5.0, 12.0, -12.0, 90.0, -90.0, largest, -largest])
    for activation in ACTIVATIONS:
        for up in (0.0, 1.0, -1e4, 1e-30):
            inputs = gates[None], torch.full((1, len(gates)), up), torch.ones(1, len(gates))
            wide = [x.double().clamp(-1e4, 1e4) for x in inputs]  # cubes that do not overflow
            scale = gates.double() / wide[0]
            wanted = expected(*wide, activation)
            leaves = [x.clone().requires_grad_() for x in inputs[:2]]
            h = glu(*leaves, activation)
            actual = h, *torch.autograd.grad(h, leaves, inputs[2])
            for one, other, grows in zip(actual, wanted, (True, False, True), strict=True):
                other = torch.where(scale > 1, other * scale, other) if grows else other
                # Far to the left only the rounding of 1 - erf, times up, remains of the gate.
                absolute = 1e-6 * max(1.0, abs(up))
                torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=absolute)


def test_extreme_values():
    check_extreme_values()


def check_strided():
    """Check halves of one projection, whose rows are twice as long, also in place."""
    for activation in ACTIVATIONS:
        gate, up, d_out = make(4, 3, 96)
        fused = torch.cat((gate, up), -1)
        check(*fused.chunk(2, -1), d_out, activation)
        check(gate.mT.contiguous().mT, up[:1].expand_as(up), d_out, activation)
        check(gate, up, torch.ones(()).expand_as(gate), activation)
        wanted = expected(gate, up, d_out, activation)
        check_raw(*fused.chunk(2, -1), d_out, activation)
        close(fused, torch.cat(wanted[1:], -1), torch.float32)


def test_strided_inputs():
    check_strided()


def check_out_over_an_input():
    for index in (0, 1):
        inputs = make(3, 130)
        wanted = glu_reference(*inputs[:2], "gelu")
        result = glu_forward(*inputs[:2], "gelu", out=inputs[index])
        assert result is inputs[index]
        torch.testing.assert_close(result, wanted)


def test_out_over_an_input():
    check_out_over_an_input()


def check_lost_values_are_noticed():
    """Overwriting tensors that another graph has saved raises autograd's error."""
    gate, up, d_out = make(3, 8)
    h = gate.requires_grad_() * up
    glu_backward(d_out, gate.detach().clone(), up, "silu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_lost_values_are_noticed():
    check_lost_values_are_noticed()


def test_raw_functions_make_no_graph():
    gate, up, d_out = make(3, 8)
    gate.requires_grad_()
    assert not glu_forward(gate, up, "silu").requires_grad
    results = glu_backward(d_out, gate.detach().clone(), up, "silu")
    assert not any(x.requires_grad for x in results)


def check_empty():
    for shape in ((0, 8), (2, 0, 3), (3, 0)):
        gate, up, d_out = make(*shape)
        leaves = gate.requires_grad_(), up.requires_grad_()
        h = glu(*leaves, "silu")
        assert h.shape == shape
        assert [x.shape for x in torch.autograd.grad(h, leaves, d_out)] == [shape, shape]
        gate, up, d_out = make(*shape)
        assert glu_forward(gate, up, "silu").shape == shape
        assert glu_backward(d_out, gate, up, "silu")[0] is d_out


def test_no_rows():
    check_empty()


def test_agrees_with_transformers():
    from transformers.activations import ACT2FN

    gate, up, _ = make(5, 60)
    names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    for activation in ACTIVATIONS:
        wanted = ACT2FN[names[activation]](gate) * up
        torch.testing.assert_close(glu(gate, up, activation), wanted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"up": torch.zeros(3, 5)}, ValueError, r"up is \[3, 5\], gate \[3, 4\]"),
        ({"gate": torch.zeros(())}, ValueError, r"gate is \[\]"),
        ({"up": torch.zeros(3, 4, device="meta")}, ValueError, "up is on meta, gate on cpu"),
        ({"up": torch.zeros(3, 4).half()}, TypeError, "up is torch.float16, gate torch.float32"),
        ({"gate": torch.zeros(3, 4).double()}, TypeError, "gate is torch.float64"),
        ({"activation": "relu"}, ValueError, "activation is 'relu', expected one of silu, gelu_"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"gate": torch.zeros(3, 4), "up": torch.zeros(3, 4), "activation": "silu"}
    for function in (glu, glu_forward, glu_backward):
        more = {"d_out": torch.zeros(3, 4)} if function is glu_backward else {}
        with pytest.raises(error, match=message) as caught:
            function(**(arguments | more | change))
        assert "\n" not in str(caught.value)


def test_raw_functions_refuse_what_they_would_have_to_copy():
    gate, up, d_out = make(4, 6, 8)
    across = gate.transpose(0, 1)
    for bad in (across, gate.mT.contiguous().mT, make(4, 6, 16)[0][..., ::2]):
        others = torch.zeros(bad.shape), torch.zeros(bad.shape)
        with pytest.raises(ValueError, match="stride"):
            glu_forward(bad, others[0], "silu")
        with pytest.raises(ValueError, match="stride"):
            glu_backward(bad, *others, "silu")
        with pytest.raises(ValueError, match="stride"):
            glu_forward(*others, "silu", out=bad)
    with pytest.raises(ValueError, match="d_out is"):
        glu_backward(d_out[:1], gate, up, "silu")


def test_bench_cases_run():
    for case in cases(torch.device("cpu")):
        case.ours()
        case.floor()
        if case.error is not None:
            case.peers["eager"]()()
            assert case.error() < 1e-5


def check_triton_in_interpreter():
    """Run the whole op with the Triton kernels, on memory that holds NaN before it is written."""
    allocate_like = torch.empty_like
    torch.empty_like = lambda *a, **k: allocate_like(*a, **k).fill_(float("nan"))
    for activation in ACTIVATIONS:
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                inputs = make(*shape, dtype=dtype)
                check(*inputs, activation)
                check_raw(*inputs, activation)
        check(*make(3, 100, dtype=torch.float16), activation)
    check_strided()
    check_out_over_an_input()
    check_lost_values_are_noticed()
    check_empty()
    check_extreme_values()
    check_extreme_values(1e30)  # its square overflows
    print(AGREED)


def test_triton_kernels_in_their_interpreter():
    check_interpreted(__file__)


@pytest.mark.parametrize("element", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_kernels_compile_for_a_gpu(element, activation, tmp_path, monkeypatch):
    """Compile for sm_90 without a GPU: the interpreter accepts more than the compiler."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from rlsloth.kernels.glu import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shared = {"ACTIVATION": activation, "INTERPRETED": False}
    for kernel, constants in (
        (triton._forward_kernel, shared | {"BLOCK": triton.FORWARD_BLOCK}),
        (triton._backward_kernel, shared | {"BLOCK": triton.BACKWARD_BLOCK}),
        (triton._backward_kernel, shared | {"BLOCK": triton.BACKWARD_BLOCK, "h_ptr": None}),
    ):
        signature = {
            name: "constexpr" if name in constants else element if name.endswith("_ptr") else "i32"
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constexprs=constants)
        options = {"num_warps": triton.WARPS}
        built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert built.asm["cubin"]


if __name__ == "__main__":
    check_triton_in_interpreter()
