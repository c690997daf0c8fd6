"""kernels/linear_logprob's fused kernels without a GPU: interpreted, and compiled."""

import math
from typing import Any

import pytest
import torch

from helpers.interpreted import AGREED, check_interpreted
from helpers.logprob_cases import CAPPED, close, expected, make
from rlsloth.kernels.linear_logprob.op import linear_logprob, weighted_logprob_sum
from rlsloth.kernels.linear_logprob.reference import linear_logprob_reference
from rlsloth.kernels.linear_logprob.tiles import PLAIN_TILE, TILES, Tile

pytestmark = pytest.mark.slow


def check_triton_in_interpreter():
    """Run the whole op with the Triton kernels, for vocabularies below, at and above one tile."""
    kinds: list[Any] = [({}, False), (CAPPED, True), (CAPPED, False), ({}, True)]
    for vocabulary in (1, 2, 127, 128, 300, 1025):
        for settings, with_bias in kinds if vocabulary == 300 else kinds[:2]:
            hidden, weight, target, gradient = make(7, 24, vocabulary, torch.bfloat16)
            bias = torch.randn(vocabulary).bfloat16() if with_bias else None
            target[0], target[1] = 0, vocabulary - 1
            check_fused(hidden, weight, target, gradient, bias, settings)
    hidden, weight, target, gradient = make(131, 72, 200, torch.bfloat16)  # more rows than a tile's
    check_fused(hidden, weight, target, gradient, None, {})
    check_fused_extremes()
    check_fused_layouts()
    check_fused_not_finite()
    check_fused_known_weights()
    check_fused_norm()
    check_row_groups()
    check_scale()
    print(AGREED)


def check_fused_layouts():
    """Check layouts that torch accepts: strided targets and bias, unaligned rows, one row, none."""
    hidden, weight, target, gradient = make(7, 24, 300, torch.bfloat16)
    bias = torch.randn(300).bfloat16()
    wanted = linear_logprob(hidden, weight, target, bias_V=bias)
    strided = torch.stack((target, target + 1), 1)[:, 0], torch.stack((bias, bias), 1)[:, 0]
    again = linear_logprob(hidden, weight, strided[0], bias_V=strided[1])
    assert torch.equal(again.logprob_N, wanted.logprob_N)
    same = linear_logprob(hidden[:1].expand(7, 24), weight, target[:1].expand(7), bias_V=bias)
    assert torch.equal(same.logprob_N, wanted.logprob_N[:1].expand(7))
    for shifted in (torch.cat((hidden.new_zeros(1), hidden.flatten()))[1:].view(7, 24),):
        again = linear_logprob(shifted, weight, target, bias_V=bias)
        assert torch.equal(again.logprob_N, wanted.logprob_N)
    shifted = torch.cat((weight.new_zeros(1), weight.flatten()))[1:].view(300, 24)
    close(linear_logprob(hidden, shifted, target, bias_V=bias).logprob_N, wanted.logprob_N.double())
    narrow = linear_logprob(hidden[:, :12], weight[:, :12], target)  # 24 bytes a row once copied
    wanted_narrow = linear_logprob_reference(
        hidden[:, :12].double(), weight[:, :12].double(), target
    )
    close(narrow.logprob_N, wanted_narrow[0])
    row = hidden[0][:, None].t()  # [1, 24] with strides (1, 1)
    close(
        linear_logprob(row, weight, target[:1], bias_V=bias).logprob_N,
        wanted.logprob_N[:1].double(),
    )
    empty = linear_logprob(hidden[:0].requires_grad_(), weight, target[:0])
    empty.logprob_N.sum().backward()
    leaf, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    kept = linear_logprob(leaf, weight, target, chunk_rows=4).logprob_N
    over = linear_logprob(other, weight, target, chunk_rows=4, overwrite_hidden=True).logprob_N
    assert torch.equal(
        *(torch.autograd.grad(x, y, gradient)[0] for x, y in ((kept, leaf), (over, other)))
    )


def check_fused_not_finite():
    hidden, weight, target, _ = make(7, 24, 300, torch.bfloat16)
    bias = torch.zeros(300).bfloat16()
    bias[target.max() + 1 :] = -math.inf  # a masked vocabulary
    out = linear_logprob(hidden, weight, target, bias_V=bias)
    masked = linear_logprob_reference(
        hidden.double(), weight.double(), target, bias_V=bias.double()
    )
    for actual, wanted in zip(out, masked, strict=True):
        close(actual, wanted)
    weight[(target[0] + 1) % 300] = math.nan
    assert linear_logprob(hidden, weight, target).logprob_N.isnan().all()


def check_fused_known_weights():
    import test_linear_logprob_weights  # type: ignore[import-not-found]  # in the folder of this script

    test_linear_logprob_weights.test_adapter_on_the_head(False, torch.bfloat16)
    test_linear_logprob_weights.test_adapter_on_the_head(True, torch.bfloat16)
    hidden, weight, target, gradient = make(37, 24, 300, torch.bfloat16)
    gradient[::3] = 0.0
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    _, grads = expected(hidden, weight, target, gradient)
    total, _ = weighted_logprob_sum(hidden, weight, target, gradient, chunk_rows=8)
    actual_grads = torch.autograd.grad(total / 3, leaves, retain_graph=True)
    for actual, wanted in zip(actual_grads, grads, strict=True):
        close(actual, wanted / 3, 2e-2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, leaves)


def check_fused_norm():
    import test_linear_logprob_norm  # type: ignore[import-not-found]  # in the folder of this script

    test_linear_logprob_norm.test_logprobs_are_bitwise_those_of_normed_hidden_states(
        8, 1.0, torch.bfloat16
    )
    for case in (
        (0.0, {}, False, False), (1.0, CAPPED, False, True), (1.0, {}, True, False),
        (0.0, CAPPED, True, True),
    ):  # fmt: skip
        test_linear_logprob_norm.check_gradients(*case, torch.bfloat16)
    test_linear_logprob_norm.test_hidden_may_be_overwritten(torch.bfloat16)


def check_row_groups():
    """A row's result does not depend on the grouping of row tiles; the last may be smaller."""
    from rlsloth.kernels.linear_logprob import triton

    hidden, weight, target, _ = make(43, 24, 100, torch.bfloat16)  # 3 row tiles
    results = []
    for row_group in (1, 2, 8):
        odds = torch.full((43, 128), math.nan).bfloat16()[:, :100]
        stats = torch.full((4, 43), math.nan)
        tile = Tile(16, 32, 16, warps=4, stages=2, row_group=row_group)
        triton.odds(hidden, weight, None, target, odds, stats, 1.0, None, tile)
        results.append((odds, stats))
    assert all(not x.isnan().any() for x in results[0])
    for odds, stats in results[1:]:
        assert torch.equal(odds, results[0][0])
        assert torch.equal(stats, results[0][1])


def check_scale():
    """Scale by 1, by another number and by NaN; more elements than all programs hold at once."""
    from rlsloth.kernels.linear_logprob import triton_gradient

    for dtype in (torch.bfloat16, torch.float32):
        for count in (0, 1, 70001):
            for factor in (1.0, -0.37, math.nan):
                x = torch.randn(count).to(dtype)
                wanted = (x.float() * factor).to(dtype)
                triton_gradient.scale(x, torch.tensor(factor))
                # Triton's interpreter truncates to 16 bits instead of rounding.
                ulp = 0.0 if factor == 1.0 else torch.finfo(dtype).eps
                torch.testing.assert_close(x, wanted, rtol=ulp, atol=0, equal_nan=True)


def check_fused(hidden, weight, target, gradient, bias, settings):
    outputs, grads = expected(hidden, weight, target, gradient, bias, **settings)
    hidden.requires_grad_()
    rows = 4 if len(hidden) < 100 else 1024
    for trainable in (False, True):
        weight.requires_grad_(trainable)
        if bias is not None:
            bias.requires_grad_(trainable)
        result = linear_logprob(hidden, weight, target, bias_V=bias, chunk_rows=rows, **settings)
        for actual, output in zip(result, outputs, strict=True):
            close(actual, output)
        with torch.no_grad():
            again = linear_logprob(hidden, weight, target, bias_V=bias, chunk_rows=rows, **settings)
        assert torch.equal(again.logprob_N, result.logprob_N)
        leaves = [hidden, *([weight, *([] if bias is None else [bias])] if trainable else [])]
        for actual, wanted in zip(
            torch.autograd.grad(result.logprob_N, leaves, gradient), grads, strict=False
        ):
            close(actual, wanted, 4 * torch.finfo(torch.bfloat16).eps)


def check_fused_extremes():
    """Check odds beyond float's range: rows whose tiles need different exponents, and underflow."""
    logits = torch.zeros(6, 304)
    logits[0, 7] = 1e4  # the target has all probability
    logits[1, 8] = 1e4  # another token of the target's tile has all probability
    logits[2, 300] = 1e4  # a token of another tile
    logits[3, 8], logits[3, 300] = 96.0, 100.0  # both tiles are scaled, differently
    logits[4, ::2], logits[4, 1::2] = -1e4, 1e4
    logits[5, 7] = 40.0
    logits = logits.bfloat16()
    target = torch.full((6,), 7)
    weight = torch.eye(304).bfloat16()
    outputs, (wanted, _) = expected(logits, weight, target, torch.ones(6))
    hidden = logits.clone().requires_grad_()
    result = linear_logprob(hidden, weight, target)
    for actual, output in zip(result, outputs, strict=True):
        torch.testing.assert_close(actual.double(), output, rtol=1e-5, atol=1e-15)
    (actual,) = torch.autograd.grad(result.logprob_N, hidden, torch.ones(6))
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-2, atol=1e-15)


def test_triton_kernels_in_their_interpreter():
    check_interpreted(__file__)


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_triton_kernels_compile_for_a_gpu(capability, tmp_path, monkeypatch):
    """Compile to machine code without a GPU: the interpreter accepts more than the compiler."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from rlsloth.kernels.linear_logprob import triton, triton_gradient, triton_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = TILES.get(capability // 10, PLAIN_TILE)
    types = {
        f"{name}_ptr": "*bf16" for name in ("hidden", "weight", "bias", "odds", "out", "tensor")
    }
    types |= {
        f"{name}_ptr": "*fp32"
        for name in ("stats", "partial", "target_logit", "sum", "scale", "factor")
    }
    types |= {"target_ptr": "*i64", "slope": "fp32", "ceiling": "fp32"}
    types |= {
        "hidden_desc": f"tensordesc<bf16[{tile.rows},{tile.depth}]>",
        "weight_desc": f"tensordesc<bf16[{tile.columns},{tile.depth}]>",
        "odds_desc": f"tensordesc<bf16[{tile.rows},{tile.columns}]>",
    }
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    constants |= {"INTERPRETED": False, "SOFTCAP": True, "WIDTH": 576, "BLOCK": 1024, "TILES": 512}
    for kernel, warps, stages in (
        (triton._target_kernel, 4, 3),
        (triton._odds_kernel, tile.warps, tile.stages),
        (triton_rows._rows_kernel, 4, 3),
        (triton_gradient._finish_kernel, 4, 3),
        (triton_gradient._scale_kernel, 4, 3),
        (triton_gradient._scale_all_kernel, 8, 3),
    ):
        signature = {
            name: "constexpr" if name in constants else types.get(name, "i32")
            for name in kernel.arg_names
        }
        known = {name: value for name, value in constants.items() if name in kernel.arg_names}
        built = compile(
            ASTSource(kernel, signature, constexprs=known),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
        assert built.asm["cubin"]
        assert built.metadata.shared <= {80: 163, 86: 99, 90: 227}[capability] * 1024


if __name__ == "__main__":
    check_triton_in_interpreter()
