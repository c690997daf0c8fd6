"""kernels/rope on a CPU: the torch path, and the Triton kernel interpreted and compiled."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.interpreted import AGREED, check_interpreted
from rlsloth.kernels.rope.bench import cases, tables
from rlsloth.kernels.rope.op import rope
from rlsloth.kernels.rope.reference import rope_reference

pytestmark = pytest.mark.slow

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Batch, tokens, query heads, key heads, head dimension, rotary dimensions.
SHAPES = [
    (1, 1, 1, 1, 2, 2),
    (2, 7, 4, 2, 16, 16),
    (3, 5, 9, 3, 64, 64),
    (1, 4, 7, 1, 80, 32),
    (2, 3, 3, 3, 24, 10),
    (1, 2, 32, 8, 128, 128),
]


def make(batch, tokens, heads, key_heads, dim, rotary, dtype=torch.float32, batched=False):
    """Make q, k, their gradients, cos and sin; if ``batched``, each sequence has its own angles."""
    generator = torch.Generator().manual_seed(0)
    q, grad_q = torch.randn(2, batch, tokens, heads, dim, generator=generator).to(dtype)
    k, grad_k = torch.randn(2, batch, tokens, key_heads, dim, generator=generator).to(dtype)
    cos, sin = tables(batch * tokens if batched else tokens, rotary, torch.device("cpu"), dtype)
    if batched:
        cos, sin = (table.view(batch, tokens, rotary) for table in (cos, sin))
    return q, k, grad_q, grad_k, cos * 1.1, sin * 1.1


def close(actual, wanted, dtype):
    assert actual.dtype == dtype
    tolerance = ROUNDING[dtype]  # of a difference, relative to its terms
    scale = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance * scale)


def check(q, k, grad_q, grad_k, cos, sin, inplace=False):
    """Check one call's outputs and gradients against float64; q and k may be views of leaves."""
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    wanted = rope_reference(*wide, cos.double(), sin.double())
    wanted_grads = torch.autograd.grad(wanted, wide, (grad_q.double(), grad_k.double()))
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    # The in-place form needs results of an operation, with the same strides.
    inputs = [leaf * 1 for leaf in leaves] if inplace else leaves
    outputs = rope(*inputs, cos, sin, inplace=inplace)
    for actual, expected, made in zip(outputs, wanted, inputs, strict=True):
        close(actual, expected, q.dtype)
        assert (actual.data_ptr() == made.data_ptr()) == inplace
        assert inplace or actual.is_contiguous()
    grads = torch.autograd.grad(outputs, leaves, (grad_q, grad_k))
    for actual, expected in zip(grads, wanted_grads, strict=True):
        close(actual, expected, q.dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_equals_float64(shape, batched, inplace):
    check(*make(*shape, batched=batched), inplace=inplace)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_sixteen_bits(dtype, inplace):
    inputs = make(*SHAPES[1], dtype=dtype)
    check(*inputs, inplace=inplace)
    check(*inputs[:4], inputs[4].float(), inputs[5].float(), inplace=inplace)


def test_extreme_values():
    q, k, grad_q, grad_k, cos, sin = make(*SHAPES[2])
    check(q * 1e30, k * 0.0, grad_q, grad_k, cos, sin)
    check(q * 1e-38, k, grad_q * 1e30, grad_k, cos, sin)


def check_strided():
    """Check a transposed projection (heads before tokens), parts of one projection, expansion."""
    q, k, grad_q, grad_k, cos, sin = make(2, 5, 4, 2, 16, 16)

    def transposed(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    check(transposed(q), transposed(k), transposed(grad_q), grad_k, cos, sin)
    fused = torch.cat((q, k), 2)
    angles = cos.expand(2, 5, 16), torch.cat((sin, sin), 0)
    check(fused[:, :, :4], fused[:, :, 4:], grad_q, grad_k, *angles)
    ones = torch.ones(()).expand_as(q)
    check(q, k[:, :1].expand_as(k), ones, grad_k, cos[..., :8].repeat(1, 1, 2), sin)


def test_strided_inputs():
    check_strided()


def check_fused_projection():
    """Rotate two views of one tensor in place: the third view and all gradients are right."""
    shape = (2, 5, 4, 2, 16, 8)
    q, k, grad_q, grad_k, cos, sin = make(*shape)
    value = k + 1
    leaf = torch.cat((q, k, value), 2).flatten(2).requires_grad_()
    fused = leaf * 2
    heads = fused.view(2, 5, 8, 16)
    new_q, new_k = rope(heads[:, :, :4], heads[:, :, 4:6], cos, sin, inplace=True)
    assert new_q.data_ptr() == fused.data_ptr()
    outputs = new_q, new_k, heads[:, :, 6:]
    wide = leaf.detach().double().requires_grad_()
    wanted_heads = (wide * 2).view(2, 5, 8, 16)
    wanted = (
        *rope_reference(
            wanted_heads[:, :, :4], wanted_heads[:, :, 4:6], cos.double(), sin.double()
        ),
        wanted_heads[:, :, 6:],
    )
    for actual, expected in zip(outputs, wanted, strict=True):
        close(actual, expected, torch.float32)
    # Cubes save the rotated values for their backward, which reads them.
    weights = grad_q, grad_k, grad_k
    loss = sum((x**3 * w).sum() for x, w in zip(outputs, weights, strict=True))
    wanted_loss = sum((x**3 * w.double()).sum() for x, w in zip(wanted, weights, strict=True))
    (grad,) = torch.autograd.grad(loss, leaf)
    (expected,) = torch.autograd.grad(wanted_loss, wide)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-3)


def test_in_place_on_views_of_one_projection():
    check_fused_projection()


def check_lost_values_are_noticed():
    """Overwriting the output of exp, which its backward needs, raises autograd's error."""
    q, k, _, _, cos, sin = make(*SHAPES[1])
    made = q.requires_grad_().exp()
    output, _ = rope(made, k, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_lost_values_are_noticed():
    check_lost_values_are_noticed()


def test_in_place_under_checkpointing():
    q, k, grad_q, _, cos, sin = make(*SHAPES[1])
    leaf = q.requires_grad_()

    def layer(x):
        return rope(x * 2, k.clone(), cos, sin, inplace=True)[0].square()

    (grad,) = torch.autograd.grad(checkpoint(layer, leaf, use_reentrant=False), leaf, grad_q)
    (wanted,) = torch.autograd.grad(layer(leaf), leaf, grad_q)
    assert torch.equal(grad, wanted)


def test_in_place_without_gradients():
    q, k, _, _, cos, sin = make(*SHAPES[1])
    wanted = rope(q, k, cos, sin)
    parameter = torch.nn.Parameter(q.clone())
    with torch.no_grad():
        outputs = rope(parameter, k, cos, sin, inplace=True)
    for actual, expected, storage in zip(outputs, wanted, (parameter, k), strict=True):
        assert torch.equal(actual, expected)
        assert torch.equal(storage, expected)


def test_gradient_of_one_output():
    q, k, grad_q, _, cos, sin = make(*SHAPES[1])
    leaves = q.requires_grad_(), k.requires_grad_()
    grads = torch.autograd.grad(rope(*leaves, cos, sin)[0], leaves, grad_q)
    assert grads[0].abs().sum() > 0
    assert torch.equal(grads[1], torch.zeros_like(k))


def check_no_tokens():
    for shape in ((1, 0, 4, 2, 8, 8), (0, 3, 4, 2, 8, 4)):
        for inplace in (False, True):
            q, k, grad_q, grad_k, cos, sin = make(*shape)
            leaves = q.requires_grad_(), k.requires_grad_()
            outputs = rope(q * 1, k * 1, cos, sin, inplace=inplace)
            assert [x.shape for x in outputs] == [q.shape, k.shape]
            grads = torch.autograd.grad(outputs, leaves, (grad_q, grad_k))
            assert [x.shape for x in grads] == [q.shape, k.shape]


def test_no_tokens():
    check_no_tokens()


def test_agrees_with_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, _, _, cos, sin = make(2, 7, 4, 2, 16, 16)
    wanted = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    for actual, expected in zip(rope(q, k, cos, sin), wanted, strict=True):
        torch.testing.assert_close(actual, expected)


LEAF = torch.zeros(1, 3, 4, 8, requires_grad=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_BSHD": torch.zeros(3, 4, 8)}, ValueError, "q_BSHD has 3 dimensions, expected 4"),
        ({"cos_BSR": torch.zeros(3, 8)}, ValueError, "cos_BSR has 2 dimensions, expected 3"),
        ({"k_BSKD": torch.zeros(1, 3, 2, 6)}, ValueError, r"k_BSKD is \[1, 3, 2, 6\]"),
        ({"k_BSKD": torch.zeros(1, 4, 2, 8)}, ValueError, r"k_BSKD is \[1, 4, 2, 8\]"),
        ({"k_BSKD": torch.zeros(1, 3, 2, 8).half()}, TypeError, "k_BSKD is torch.float16"),
        ({"k_BSKD": torch.zeros(1, 3, 2, 8, device="meta")}, ValueError, "k_BSKD is on meta"),
        ({"q_BSHD": torch.zeros(1, 3, 4, 16)[..., ::2]}, ValueError, "q_BSHD has stride 2"),
        ({"cos_BSR": torch.zeros(2, 3, 8)}, ValueError, r"cos_BSR is \[2, 3, 8\]"),
        ({"cos_BSR": torch.zeros(1, 3, 10)}, ValueError, r"cos_BSR is \[1, 3, 10\]"),
        ({"cos_BSR": torch.zeros(1, 3, 7)}, ValueError, "cos_BSR has 7 rotary dimensions"),
        ({"cos_BSR": torch.zeros(1, 3, 8).double()}, TypeError, "cos_BSR is torch.float64"),
        ({"sin_BSR": torch.zeros(1, 3, 4)}, ValueError, r"sin_BSR is \[1, 3, 4\]"),
        ({"q_BSHD": LEAF, "inplace": True}, ValueError, "q_BSHD is a leaf that requires grad"),
        ({"q_BSHD": LEAF[..., :8], "inplace": True}, ValueError, "or a view of it"),
        (
            {"k_BSKD": torch.zeros(1, 3, 1, 8).expand(1, 3, 2, 8), "inplace": True},
            ValueError,
            "k_BSKD is expanded",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "q_BSHD": torch.zeros(1, 3, 4, 8),
        "k_BSKD": torch.zeros(1, 3, 2, 8),
        "cos_BSR": torch.zeros(1, 3, 8),
        "sin_BSR": torch.zeros(1, 3, 8),
    }
    with pytest.raises(error, match=message) as caught:
        rope(**(arguments | change))
    assert "\n" not in str(caught.value)


def test_bench_cases_run():
    for case in cases(torch.device("cpu")):
        case.ours()
        case.floor()
        case.peers["eager"]()()
        assert case.error is not None
        assert case.error() < 1e-5


def check_triton_in_interpreter():
    """Run the whole op with the Triton kernel, on memory that holds NaN before it is written."""
    allocate_like = torch.empty_like
    torch.empty_like = lambda *a, **k: allocate_like(*a, **k).fill_(float("nan"))
    for inplace in (False, True):
        for shape in SHAPES:
            check(*make(*shape), inplace=inplace)
            check(*make(*shape, dtype=torch.bfloat16, batched=True), inplace=inplace)
        inputs = make(*SHAPES[1], dtype=torch.float16)
        check(*inputs[:4], inputs[4].float(), inputs[5].float(), inplace=inplace)
    check_strided()
    check_fused_projection()
    check_lost_values_are_noticed()
    check_no_tokens()
    test_extreme_values()
    print(AGREED)


def test_triton_kernel_in_its_interpreter():
    check_interpreted(__file__)


@pytest.mark.parametrize("element", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize(("inplace", "rotary"), [(False, 128), (False, 96), (True, 96)])
def test_triton_kernel_compiles_for_a_gpu(element, inplace, rotary, tmp_path, monkeypatch):
    """Compile for sm_90 without a GPU: the interpreter accepts more than the compiler."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from rlsloth.kernels.rope import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"Q_HEADS": 28, "Q_BLOCK": 32, "K_HEADS": 4, "K_BLOCK": 4, "DIM": 128}
    constants |= {"HALF": rotary // 2, "HALF_BLOCK": 64, "REST_BLOCK": 32 if rotary < 128 else 0}
    constants |= {"INPLACE": inplace, "BACKWARD": True}
    kernel = triton._rope_kernel
    signature = {
        name: "constexpr" if name in constants else element if name.endswith("_ptr") else "i32"
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert built.asm["cubin"]


if __name__ == "__main__":
    check_triton_in_interpreter()
