"""kernels/rms_norm on a CPU: the torch path, and the Triton kernels interpreted and compiled."""

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from rlsloth.kernels.rms_norm.bench import cases
from rlsloth.kernels.rms_norm.op import MAX_WIDTH, add_rms_norm, fork_rms_norm, rms_norm
from rlsloth.kernels.rms_norm.reference import rms_norm_reference

pytestmark = pytest.mark.slow

EPS = 1e-6
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(*shape, dtype=torch.float32, weight_dtype=None, offset=0.0, seed=0):
    """Make x, residual, weight, then the gradients of normed and total."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, grad, grad_total = (
        torch.randn(*shape, generator=generator).to(dtype) for _ in range(4)
    )
    weight = 1.0 - offset + 0.3 * torch.randn(shape[-1], generator=generator)
    return x, residual, weight.to(weight_dtype or dtype), grad, grad_total


def close(actual, wanted, dtype=torch.float32):
    """Compare up to rounding, including that of a sum's largest terms."""
    tolerance = ROUNDING[dtype]
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=False
    )


def check_norm(x, weight, grad, offset=0.0, trained=True):
    """Check the outputs and gradients of one call against float64."""
    dtype = x.dtype
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = rms_norm_reference(*wide, EPS, offset)
    wanted_grads = torch.autograd.grad(wanted, wide, grad.double())
    x = x.detach().requires_grad_()
    weight = weight.detach().requires_grad_(trained)
    y = rms_norm(x, weight, EPS, offset)
    assert y.dtype == dtype
    assert y.is_contiguous()
    close(y, wanted, dtype)
    leaves = [x, weight] if trained else [x]
    for leaf, actual, wanted_grad in zip(
        leaves, torch.autograd.grad(y, leaves, grad), wanted_grads, strict=False
    ):
        assert actual.dtype == leaf.dtype
        assert actual.shape == leaf.shape
        close(actual, wanted_grad, dtype)


def check_add(x, residual, weight, grad, grad_total, offset=0.0, use=(True, True), trained=True):
    """Check add_rms_norm against float64, with gradients for either output or both."""
    dtype = x.dtype
    leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
    weight = weight.detach().requires_grad_(trained)
    outputs = add_rms_norm(*leaves, weight, EPS, offset)
    close(outputs[1], x.double() + residual.double(), dtype)
    # In 16 bits, too, the norm is that of the rounded sum.
    wide = [t.detach().double().requires_grad_() for t in (outputs[1], weight)]
    wanted = rms_norm_reference(*wide, EPS, offset), wide[0]
    close(outputs[0], wanted[0], dtype)

    def gradients(values, inputs):
        """Return gradients of the outputs in use; that of an unused output stays undefined."""
        values = [v for v, used in zip(values, use, strict=True) if used]
        into = [g for g, used in zip((grad, grad_total), use, strict=True) if used]
        into = [g.to(v.dtype) for g, v in zip(into, values, strict=True)]
        return torch.autograd.grad(values, inputs, into, materialize_grads=True)

    wanted_grads = gradients(wanted, wide)
    grads = gradients(outputs, [*leaves, weight] if trained else leaves)
    close(grads[0], wanted_grads[0], dtype)
    assert torch.equal(grads[0], grads[1])
    if trained:
        close(grads[2], wanted_grads[1], dtype)
    # Without a residual, x is the sum and is returned unchanged.
    leaf = outputs[1].detach().requires_grad_()
    forked = fork_rms_norm(leaf, weight, EPS, offset)
    assert torch.equal(forked[1], leaf)
    close(forked[0], wanted[0], dtype)
    grads = gradients(forked, [leaf, weight] if trained else [leaf])
    for actual, expected in zip(grads, wanted_grads, strict=False):
        close(actual, expected, dtype)


@pytest.mark.parametrize("shape", [(7, 97), (1, 4096), (3, 5, 2, 128), (5000, 3), (33, 576), (4,)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_equals_float64(shape, offset):
    x, _, weight, grad, _ = make(*shape, offset=offset)
    check_norm(x, weight, grad, offset)
    check_norm(x, weight, grad, offset, trained=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_sixteen_bits(dtype, weight_dtype):
    x, residual, weight, grad, grad_total = make(9, 200, dtype=dtype, weight_dtype=weight_dtype)
    check_norm(x, weight, grad)
    check_add(x, residual, weight, grad, grad_total)


@pytest.mark.parametrize("use", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("trained", [True, False])
def test_add_with_gradients_of_either_output(use, trained):
    check_add(*make(2, 11, 96), use=use, trained=trained)


def test_is_rounded_once():
    x, residual, weight, _, _ = make(64, 256, dtype=torch.bfloat16)
    assert torch.equal(add_rms_norm(x, residual, weight, EPS)[1], x + residual)
    wanted = rms_norm_reference(x.float(), weight.float(), EPS).to(torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, EPS), wanted)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6, 1e4, 1e15])
def test_extreme_values(scale):
    x, _, weight, grad, _ = make(5, 129)
    x = x * scale
    x[1] = 0.0
    check_norm(x, weight, grad * min(1.0, scale))


def test_strided_inputs():
    check_strided()


def check_strided():
    both, _, weight, grad, _ = make(6, 192)
    first, second = both.chunk(2, -1)
    weight = torch.stack((weight[:96], weight[96:]), 1)[:, 0]
    for x in (first, second, both.t()[:, :6].t()[:, :96], both[:, ::2]):
        check_norm(x, weight, grad[:, 96:])
        check_add(x, second, weight, grad[:, ::2], first)


def test_no_rows():
    check_no_rows()


def check_no_rows():
    for shape in ((0, 8), (2, 0, 3, 8)):
        x, residual, weight, _, _ = (t.requires_grad_() for t in make(*shape))
        normed, total = add_rms_norm(x, residual, weight, EPS)
        (rms_norm(x, weight, EPS).sum() + normed.sum() + total.sum()).backward()
        assert normed.shape == total.shape == x.grad.shape == residual.grad.shape == shape
        assert torch.equal(weight.grad, torch.zeros(8))


def test_expanded_gradient():
    x, residual, weight, _, _ = make(6, 40)
    check_norm(x, weight, torch.ones(()).expand(6, 40))
    check_add(x, residual, weight, torch.ones(()).expand(6, 40), torch.ones(1, 40).expand(6, 40))


def test_agrees_with_transformers():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, _, weight, _, _ = make(4, 64)
    for norm, offset in ((LlamaRMSNorm(64, EPS), 0.0), (Gemma3RMSNorm(64, EPS), 1.0)):
        norm.weight.data = weight
        torch.testing.assert_close(rms_norm(x, weight, EPS, offset), norm(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(())}, ValueError, r"x is \[\]"),
        ({"x": torch.zeros(3, MAX_WIDTH + 1)}, ValueError, "H from 1 to 32768"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"x is \[3, 0\]"),
        ({"x": torch.zeros(3, 4).double()}, TypeError, "x is torch.float64"),
        ({"weight_H": torch.zeros(5)}, ValueError, r"weight_H is \[5\], x \[3, 4\]"),
        ({"weight_H": torch.zeros(4, device="meta")}, ValueError, "weight_H is on meta"),
        ({"weight_H": torch.zeros(4).half()}, TypeError, "weight_H is torch.float16"),
        ({"residual": torch.zeros(1, 4)}, ValueError, r"residual is \[1, 4\]"),
        ({"residual": torch.zeros(3, 4).half()}, TypeError, "residual is torch.float16"),
        ({"residual": torch.zeros(3, 4, device="meta")}, ValueError, "residual is on meta"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"x": torch.zeros(3, 4), "weight_H": torch.zeros(4), "eps": EPS}
    with pytest.raises(error, match=message) as caught:
        add_rms_norm(**({"residual": arguments["x"]} | arguments | change))
    assert "\n" not in str(caught.value)
    if "residual" not in change:
        with pytest.raises(error, match=message):
            rms_norm(**(arguments | change))


def test_bench_cases_run():
    for case in cases(torch.device("cpu")):
        case.ours()
        case.floor()
        case.peers.get("eager", case.peers["torch"])()()
        assert case.error is None or case.error() < 1e-5


def check_triton_in_interpreter():
    """Run the whole op with the Triton kernels, on memory that holds NaN before it is written."""
    allocate, allocate_like = torch.empty, torch.empty_like
    torch.empty = lambda *a, **k: allocate(*a, **k).fill_(float("nan"))
    torch.empty_like = lambda *a, **k: allocate_like(*a, **k).fill_(float("nan"))
    # Short rows (several per program, the last one not full); one program, and several.
    for shape in ((1, 1), (3, 97), (45, 3, 128), (2, 4096), (9, 1500), (1, 8192), (70, 576)):
        for dtype in ROUNDING:
            x, residual, weight, grad, grad_total = make(*shape, dtype=dtype, offset=1.0)
            for trained in (False, True):
                check_norm(x, weight, grad, 1.0, trained)
                check_add(x, residual, weight, grad, grad_total, 1.0, trained=trained)
    for use in ((True, False), (False, True)):
        for trained in (False, True):
            check_add(*make(5, 130), use=use, trained=trained)
    check_norm(
        *(make(9, 200, dtype=torch.bfloat16, weight_dtype=torch.float32)[i] for i in (0, 2, 3))
    )
    check_strided()
    check_no_rows()
    for scale in (0.0, 1e-30, 1e15):
        test_extreme_values(scale)
    test_expanded_gradient()
    check_deterministic()
    print(AGREED)


def check_deterministic():
    grads = []
    for _ in range(2):
        x, _, weight, grad, _ = make(300, 64)
        weight.requires_grad_()
        grads += torch.autograd.grad(rms_norm(x, weight, EPS), weight, grad)
    assert torch.equal(*grads)


def test_triton_kernels_in_their_interpreter():
    check_interpreted(__file__)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("element", "width"), [("*bf16", 4096), ("*fp32", 5120), ("*fp16", 128)])
def test_triton_kernels_compile_for_a_gpu(element, width, add, tmp_path, monkeypatch):
    """Compile for sm_90 without a GPU: the interpreter accepts more than the compiler."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from rlsloth.kernels.rms_norm import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiling = triton._tiling(width)
    warps = tiling.pop("num_warps")
    absent = {} if add else {"residual_ptr": None, "grad_total_ptr": None}
    trained = {"STAGES": 3}
    frozen = {"STAGES": 1, "partial_ptr": None}
    for kernel, more in (
        (triton._forward_kernel, {}),
        (triton._backward_kernel, frozen),
        (triton._backward_kernel, trained),
    ):
        constants = {k: v for k, v in (tiling | absent | more).items() if k in kernel.arg_names}
        types = {"partial_ptr": "*fp32", "weight_ptr": "*fp32", "eps": "fp32", "offset": "fp32"}
        signature = {
            name: "constexpr"
            if name in constants
            else types.get(name, element if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constexprs=constants)
        built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        assert built.asm["cubin"]


if __name__ == "__main__":
    check_triton_in_interpreter()
