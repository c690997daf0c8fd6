"""kernels/lora on a CPU: outputs and every gradient against the reference in float64."""

from dataclasses import replace

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from helpers.lora_layers import (
    BIASED,
    BIASED_LEARNT,
    BIASED_NF4,
    LEARNT,
    NF4,
    OFF,
    OFF_NF4,
    PLAIN,
    Kind,
    check,
    close,
    input_like,
    make,
    make_mlp,
    mlp,
    mlp_reference,
    parameters,
    siblings,
    siblings_reference,
    wide,
)
from rlsloth.kernels.lora.bench import cases
from rlsloth.kernels.lora.op import LoraLinear, lora_linear, lora_linears, lora_mlp
from rlsloth.kernels.lora.reference import lora_linear_reference

pytestmark = pytest.mark.slow

KINDS = [PLAIN, NF4, BIASED, BIASED_NF4, OFF, OFF_NF4, LEARNT, BIASED_LEARNT]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 13, 300])
def test_one_linear(tokens, kind):
    layer = make(70, 64, kind)
    check(siblings, siblings_reference, [layer], input_like(tokens, 64))
    x = input_like(2, 3, 64)
    assert torch.equal(lora_linear(x, layer), lora_linears(x, (layer,))[0])


@pytest.mark.parametrize(
    "kinds",
    [
        (NF4, NF4, NF4),
        (PLAIN, BIASED_NF4, OFF),
        (OFF, OFF_NF4, BIASED),
        (OFF, OFF, OFF_NF4),
        (BIASED_LEARNT, LEARNT, LEARNT),
        (LEARNT, OFF, BIASED),
    ],
)
@pytest.mark.parametrize("tokens", [7, 261])
def test_siblings_share_their_input(tokens, kinds):
    layers = [
        make(out, 128, kind, seed=i)
        for i, (out, kind) in enumerate(zip((96, 32, 33), kinds, strict=True))
    ]
    check(siblings, siblings_reference, layers, input_like(tokens, 128))


@pytest.mark.parametrize(
    "kinds",
    [
        (NF4, NF4, NF4),
        (PLAIN, PLAIN, PLAIN),
        (BIASED_NF4, BIASED, BIASED_NF4),
        (NF4, OFF_NF4, OFF_NF4),
        (OFF_NF4, NF4, PLAIN),
        (OFF, OFF_NF4, NF4),
        (OFF, OFF, OFF_NF4),
        (LEARNT, LEARNT, LEARNT),
        (BIASED_LEARNT, BIASED_LEARNT, BIASED_LEARNT),
        (OFF, LEARNT, OFF),
        (NF4, PLAIN, LEARNT),
        (LEARNT, OFF, NF4),
    ],
)
@pytest.mark.parametrize("tokens", [1, 300])
def test_mlp(tokens, kinds):
    check(mlp(), mlp_reference(), make_mlp(kinds), input_like(tokens, 64))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_mlp_activations_and_extreme_values(activation, scale):
    layers = make_mlp((NF4, PLAIN, NF4))
    check(mlp(activation), mlp_reference(activation), layers, input_like(2, 9, 64) * scale)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_sixteen_bits(adapter):
    kind = Kind(rank=8, nf4=True, adapter_dtype=adapter)
    dtype = torch.bfloat16
    layers = [make(96, 64, kind, dtype, seed) for seed in range(3)]
    check(siblings, siblings_reference, layers, input_like(50, 64, dtype=dtype), dtype)
    for one in (kind, LEARNT):
        layers = make_mlp((one, one, one), dtype=dtype)
        check(mlp(), mlp_reference(), layers, input_like(50, 64, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    layers, x = make_mlp((NF4, PLAIN, NF4), dtype=dtype), input_like(9, 64, dtype=dtype)
    results = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = [lora_mlp(leaf, *layers, "silu"), *lora_linears(leaf, tuple(layers[:2]))]
            grads = torch.autograd.grad(sum(y.sum() for y in outputs), [leaf, *parameters(layers)])
        results.append([*outputs, *grads])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    "kinds", [(NF4, NF4, NF4), (NF4, NF4, OFF_NF4), (OFF_NF4,) * 3, (LEARNT,) * 3]
)
def test_only_gate_and_up_are_kept_of_what_is_wide(kinds):
    layers, x = make_mlp(kinds), input_like(50, 64).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora_mlp(x, *layers, "silu")
    weights = {w.data_ptr() for layer in layers if isinstance(w := layer.weight, torch.Tensor)}
    wide = [size for start, size in kept.items() if start not in weights]
    assert sum(size >= 50 * 192 * 4 for size in wide) == 2


def test_two_layers_share_one_weight():
    first, second = make(64, 64, NF4), make(64, 64, NF4, seed=1)
    second = replace(second, weight=first.weight)
    check(siblings, siblings_reference, [first, second], input_like(40, 64))


@pytest.mark.parametrize("kind", [PLAIN, NF4])
def test_no_tokens(kind):
    layers, x = make_mlp((kind, kind, kind)), torch.zeros(2, 0, 64, requires_grad=True)
    outputs = [*lora_linears(x, tuple(layers[:2])), lora_mlp(x, *layers, "silu")]
    assert [y.shape for y in outputs] == [(2, 0, 192), (2, 0, 192), (2, 0, 64)]
    grads = torch.autograd.grad(sum(y.sum() for y in outputs), [x, *parameters(layers)])
    assert all(g.shape == p.shape for g, p in zip(grads, [x, *parameters(layers)], strict=True))
    assert all(not grad.any() for grad in grads)
    with torch.no_grad():
        assert lora_mlp(x, *layers, "silu").shape == (2, 0, 64)


def test_an_unused_sibling():
    layers = [make(out, 64, NF4, seed=out) for out in (96, 32, 40)]
    linears = [wide(layer) for layer in layers]
    x = input_like(11, 64).requires_grad_()
    wide_x = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(
        lora_linear_reference(wide_x, linears[1]).sum(), [wide_x, *linears[1][2:4]]
    )
    _, y, _ = lora_linears(x, tuple(layers))
    grads = torch.autograd.grad(y.sum(), [x, *parameters(layers)], allow_unused=True)
    assert len(grads) == 7
    for index, grad in zip((0, 3, 4), wanted, strict=True):
        close(grads[index], grad)
    assert all(grads[i] is None for i in (1, 2, 5, 6))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(4)}, ValueError, "weight has 1 dimensions"),
        ({"weight": torch.zeros(6, 4).double()}, TypeError, "weight is torch.float64"),
        ({"weight": torch.zeros(6, 4, requires_grad=True)}, ValueError, "beside an adapter"),
        ({"bias": torch.zeros(6, requires_grad=True)}, ValueError, "beside an adapter"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias is \[5\], expected \[6\]"),
        ({"lora_b": None}, ValueError, "pass both or neither"),
        ({"lora_a": torch.zeros(2, 5)}, ValueError, r"lora_a is \[2, 5\], expected \[2, 4\]"),
        ({"lora_b": torch.zeros(6, 3)}, ValueError, r"lora_b is \[6, 3\], expected \[6, 2\]"),
        ({"lora_b": torch.zeros(6, 2).half()}, TypeError, "lora_b is torch.float16"),
        ({"lora_a": torch.zeros(2, 4, device="meta")}, ValueError, "lora_a is on meta"),
    ],
)
def test_a_bad_layer_is_named(change, error, message):
    fields = {"weight": torch.zeros(6, 4), "bias": torch.zeros(6)}
    fields |= {"lora_a": torch.zeros(2, 4), "lora_b": torch.zeros(6, 2)}
    with pytest.raises(error, match=message) as caught:
        LoraLinear(**(fields | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 63), ValueError, r"x is \[3, 63\], expected \[..., 64\]"),
        (torch.zeros(3, 64).bfloat16(), TypeError, "x is torch.bfloat16, weight torch.float32"),
        (torch.zeros(3, 64, device="meta"), ValueError, "x is on meta"),
    ],
)
def test_a_bad_input_is_named(x, error, message):
    layers = make_mlp((NF4, NF4, NF4))
    for run in (lambda: lora_linears(x, tuple(layers)), lambda: lora_mlp(x, *layers, "silu")):
        with pytest.raises(error, match=message):
            run()


def test_a_bad_mlp_is_named():
    gate, up, down = make_mlp((NF4, NF4, NF4))
    x = torch.zeros(2, 64)
    with pytest.raises(ValueError, match="activation is 'relu'"):
        lora_mlp(x, gate, up, down, "relu")
    for others in ((make(128, 64), down), (up, make(64, 128))):
        with pytest.raises(ValueError, match="do not fit together"):
            lora_mlp(x, gate, *others, "silu")
    with pytest.raises(TypeError, match=r"down is torch\.bfloat16"):
        lora_mlp(x, gate, up, make(64, 192, PLAIN, torch.bfloat16), "silu")


def test_bench_cases_run():
    for case in cases(torch.device("cpu")):
        case.ours()
        case.floor()
        if case.error is not None:
            assert case.error() < 1e-4


def check_triton_in_interpreter():
    """Run the MLP with the NF4 and gated-linear kernels, in 16 bits also with the adapters' own."""
    for tokens in (3, 260):
        check(mlp(), mlp_reference(), make_mlp((NF4, BIASED_NF4, NF4)), input_like(tokens, 64))
    half = torch.bfloat16
    for rank, nf4 in ((5, True), (16, False), (16, True), (80, True)):
        kind = Kind(rank=rank, nf4=nf4, bias=True)
        layers, x = make_mlp((kind, kind, kind), dtype=half), input_like(70, 64, dtype=half)
        # The memory layout must not matter.
        layers[2] = replace(layers[2], lora_a=layers[2].lora_a.detach().t().contiguous().t())
        layers[2].lora_a.requires_grad_()
        check(mlp(), mlp_reference(), layers, x, half)
        check(siblings, siblings_reference, layers[:2], x, half)
    print(AGREED)


def test_triton_kernels_in_their_interpreter():
    check_interpreted(__file__)


if __name__ == "__main__":
    check_triton_in_interpreter()
