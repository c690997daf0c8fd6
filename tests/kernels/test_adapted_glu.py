"""kernels/adapted_glu and lora's low-rank addition on a CPU: torch, interpreted and compiled."""

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from rlsloth.kernels.adapted_glu import op
from rlsloth.kernels.adapted_glu.bench import cases
from rlsloth.kernels.adapted_glu.op import (
    GluAdapters,
    GluInputs,
    adapted_glu_backward,
    adapted_glu_forward,
)
from rlsloth.kernels.adapted_glu.reference import adapted_glu_reference
from rlsloth.kernels.glu.op import ACTIVATIONS
from rlsloth.kernels.lora.products import add_product

pytestmark = pytest.mark.slow

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Tokens, width, and the ranks of gate, up and down.
SIZES = [
    (1, 8, (16, 16, 16)),
    (70, 100, (16, 32, 48)),
    (130, 264, (5, 16, 64)),
    (64, 128, (64, 8, 16)),
]


def normal(*shape, seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def inside(tensor, before=8, behind=16):
    """Copy the values into longer rows, with NaN on both sides."""
    rows, columns = tensor.shape
    wide = torch.full((rows, before + columns + behind), float("nan"), dtype=tensor.dtype)
    wide[:, before : before + columns] = tensor
    return wide[:, before : before + columns]


def make(tokens, width, ranks, dtype=torch.float32):
    """Make (inputs, adapters, d_out, d_low); a rank of 0 is an adapter that is off."""
    gate_rank, up_rank, down_rank = ranks
    low = [normal(tokens, r, seed=i, dtype=dtype) for i, r in enumerate(ranks)]
    inputs = GluInputs(
        inside(normal(tokens, width, seed=3, dtype=dtype)),
        normal(tokens, width, seed=4, dtype=dtype),
        inside(low[0]),
        inside(low[1]),
    )
    factors = [
        normal(*shape, seed=5, dtype=dtype, scale=0.3) if rank else None
        for rank, shape in zip(
            ranks, ((width, gate_rank), (width, up_rank), (down_rank, width)), strict=True
        )
    ]
    d_out = inside(normal(tokens, width, seed=6, dtype=dtype))
    return inputs, GluAdapters(*factors), d_out, inside(low[2])


def wanted_of(inputs, adapters, d_out, d_low, activation):
    """Return h, low, then the gradients of gate, up and the three factors, in float64."""
    tensors = [inputs.gate_TF, inputs.up_TF, inputs.gate_low_TR, inputs.up_low_TR]
    width = inputs.up_TF.shape[1]
    factors = [
        torch.zeros(shape) if factor is None else factor
        for factor, shape in zip(
            (adapters.gate_b_FR, adapters.up_b_FR, adapters.down_a_RF),
            ((width, 0), (width, 0), (0, width)),
            strict=True,
        )
    ]
    wide = [x.detach().double().requires_grad_() for x in (*tensors, *factors)]
    h, low = adapted_glu_reference(*wide, activation)
    grads = torch.autograd.grad(
        (h, low), [*wide[:2], *wide[4:]], (d_out.double(), d_low.double()), allow_unused=True
    )
    return [h.detach(), low.detach(), *grads]


def close(actual, wanted, dtype):
    if wanted.numel():
        error = (actual.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
        assert error.item() < ROUNDING[dtype], error.item()


def check(tokens, width, ranks, activation, dtype=torch.float32):
    inputs, adapters, d_out, d_low = made = make(tokens, width, ranks, dtype)
    h_wanted, low_wanted, *grads_wanted = wanted_of(*made, activation)
    before = inputs.gate_TF.clone(), inputs.up_TF.clone()
    out = inside(torch.full((tokens, width), float("nan"), dtype=dtype))
    low = adapted_glu_forward(inputs, adapters, activation, out)
    assert torch.equal(inputs.gate_TF, before[0])
    assert torch.equal(inputs.up_TF, before[1])
    close(out, h_wanted, dtype)
    assert (low is None) == (ranks[2] == 0)
    if low is not None:
        assert low.dtype == torch.float32
        close(low, low_wanted, dtype)
    factors = adapted_glu_backward(d_out, d_low, inputs, adapters, activation)
    for actual, wanted in zip((inputs.gate_TF, inputs.up_TF), grads_wanted, strict=False):
        assert actual.dtype == dtype
        close(actual, wanted, dtype)
    for rank, actual, wanted in zip(ranks, factors, grads_wanted[2:], strict=True):
        assert (actual is None) == (rank == 0)
        if actual is not None:
            assert actual.dtype == torch.float32
            close(actual, wanted, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "sizes", [*SIZES, (9, 40, (0, 4, 0)), (9, 40, (3, 0, 70)), (4, 8, (0, 0, 0))]
)
def test_equals_float64(sizes, activation):
    check(*sizes, activation)
    check(*sizes, activation, torch.bfloat16)


def test_chunks_of_rows_change_nothing(monkeypatch):
    monkeypatch.setattr(op, "CHUNK_ROWS", 32)
    check(*SIZES[1], "silu")


def test_no_tokens():
    check(0, 40, (16, 16, 16), "silu")


def check_addition(tokens, width, rank, dtype):
    base, low = inside(normal(tokens, width, seed=0, dtype=dtype)), normal(tokens, rank, seed=1)
    factor, low = normal(width, rank, seed=2, dtype=dtype).t(), inside(low.to(dtype))
    wanted = base.double() + low.double() @ factor.double()
    out = torch.full((tokens, width), float("nan"), dtype=dtype)
    add_product(base, low, factor, out)
    close(out, wanted, dtype)
    add_product(base, low, factor, base)
    assert torch.equal(base, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_addition(dtype):
    for sizes in ((70, 200, 48), (1, 8, 16), (0, 8, 16)):
        check_addition(*sizes, dtype)


def test_bench_cases_run():
    for case in cases(torch.device("cpu")):
        case.ours()
        case.floor()
        if case.error is not None:
            assert case.error() < 1e-5


def check_triton_in_interpreter():
    """Run every path of the kernels, on memory that holds NaN before it is written."""
    allocate = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda *a, **k: allocate(*a, **k).fill_(float("nan"))
    inputs, adapters, *_ = make(*SIZES[0], torch.bfloat16)
    assert op.fused(inputs, adapters)
    for sizes in SIZES:
        for dtype in (torch.bfloat16, torch.float16):
            check(*sizes, "silu", dtype)
    for activation in ACTIVATIONS:
        check(*SIZES[1], activation, torch.bfloat16)
    check(0, 40, (16, 16, 16), "silu", torch.bfloat16)
    for added in ((70, 200, 48), (1, 8, 16), (130, 129, 5), (0, 8, 16)):
        check_addition(*added, torch.bfloat16)
    print(AGREED)


def test_triton_kernels_in_their_interpreter():
    check_interpreted(__file__)


# Shared memory that Triton may use per block, in KiB.
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}


def gpu_code(kernel, constants, warps, capability):
    """Compile to machine code without a GPU: the interpreter accepts more than the compiler.

    Arguments are multiples of 16, as they mostly are: only then are tiles loaded ahead.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    float32 = {"partial_ptr": "*fp32"}
    signature = {
        name: "constexpr"
        if name in constants
        else float32.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    names = [name for name in kernel.arg_names if name not in ("tokens", "steps")]
    attrs = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name not in constants
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert built.asm["cubin"]
    return built


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("rank", [32, 64])
def test_triton_kernels_fit_every_gpu(rank, capability, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from rlsloth.kernels.adapted_glu import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    limit = SHARED[capability] << 10
    fewer = rank > triton.STAGED_RANK and limit < triton.STAGED_BYTES
    for kernel, tile, stages in (
        (triton._forward_kernel, triton.FORWARD, triton.FORWARD.stages - fewer),
        (triton._backward_kernel, triton.BACKWARD, triton.BACKWARD.stages),
    ):
        constants = {
            "RANK": rank, "DOWN_RANK": rank, "TOKENS": tile.tokens, "COLUMNS": tile.columns,
            "STAGES": stages, "ACTIVATION": "silu", "INTERPRETED": False,
        }  # fmt: skip
        constants = {name: constants[name] for name in constants if name in kernel.arg_names}
        assert gpu_code(kernel, constants, tile.warps, capability).metadata.shared <= limit


@pytest.mark.parametrize("capability", [86, 90])
def test_low_rank_addition_fits(capability, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from rlsloth.kernels.lora import products, triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "RANK": products.MOST_RANK, "TOKENS": triton.TOKENS, "COLUMNS": triton.COLUMNS,
        "INTERPRETED": False,
    }  # fmt: skip
    built = gpu_code(triton._kernel, constants, triton.WARPS, capability)
    assert built.metadata.shared <= SHARED[capability] << 10


if __name__ == "__main__":
    check_triton_in_interpreter()
