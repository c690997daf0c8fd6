"""kernels/linear_logprob on a CUDA GPU: the fused Triton product and cuBLAS."""

from dataclasses import replace

import pytest
import torch

from rlsloth.kernels.linear_logprob.bench import CHECKED_ROWS, peaked
from rlsloth.kernels.linear_logprob.norm import FinalNorm
from rlsloth.kernels.linear_logprob.op import HeadLora, linear_logprob, weighted_logprob_sum
from rlsloth.kernels.linear_logprob.reference import linear_logprob_reference
from rlsloth.kernels.linear_logprob.tiles import tile_of
from rlsloth.kernels.measure import peak_bytes
from rlsloth.kernels.rms_norm.op import rms_norm
from rlsloth.kernels.rms_norm.reference import rms_norm_reference

CAPPED = {"temperature": 0.7, "softcap": 20.0, "logit_scale": 1.3}


def make(n, h, v, dtype, seed=0):
    """Make inputs whose logits reach about +-30."""
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(n, h, device="cuda", generator=generator)
    weight = torch.randn(v, h, device="cuda", generator=generator) * (6.0 / h**0.5)
    target = torch.randint(0, v, (n,), device="cuda", generator=generator)
    target[::3] = (hidden[::3] @ weight.t()).argmax(1)  # confident rows too
    gradient = torch.randn(n, device="cuda", generator=generator)
    return hidden.to(dtype), weight.to(dtype), target, gradient


@pytest.mark.parametrize("settings", [{}, CAPPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1000, 8193, 50257, 128256, 151936])
def test_equals_float64(vocabulary, dtype, settings):
    hidden, weight, target, gradient = make(300, 256, vocabulary, dtype)
    bias = torch.randn(vocabulary, device="cuda").to(dtype)
    wide = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    outputs = linear_logprob_reference(wide[0], wide[1], target, bias_V=wide[2], **settings)
    grads = torch.autograd.grad(outputs[0], wide, gradient.double())
    rounding = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    hidden.requires_grad_()
    for trainable in (False, True):
        weight.requires_grad_(trainable)
        bias.requires_grad_(trainable)
        result = linear_logprob(hidden, weight, target, bias_V=bias, chunk_rows=128, **settings)
        for actual, wanted in zip(result, outputs, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-4)
        leaves = [hidden, weight, bias] if trainable else [hidden]
        for actual, wanted in zip(
            torch.autograd.grad(result.logprob_N, leaves, gradient), grads, strict=False
        ):
            # A sum's rounding error scales with its largest terms, not with the sum.
            error = (actual.double() - wanted).abs().max() / wanted.abs().max()
            assert error.item() < rounding
            # Not in float16, where a certain row's gradient is below the smallest normal number.
            if actual.shape == hidden.shape and dtype != torch.float16:
                rows = (actual.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
                assert rows.max().item() < 4 * rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_deterministic(dtype):
    """Repeated runs over many rows are bitwise equal."""
    hidden, weight, target, gradient = make(1024, 128, 151936, dtype)
    grads = []
    for _ in range(5):
        leaf = hidden.clone().requires_grad_()
        result = linear_logprob(leaf, weight, target)
        grads.append(torch.autograd.grad(result.logprob_N, leaf, gradient)[0])
    assert all(torch.equal(grads[0], grad) for grad in grads[1:])


def test_on_policy_ratio_is_exactly_one():
    hidden, weight, target, _ = make(1500, 256, 128256, torch.bfloat16)
    with torch.no_grad():
        old = linear_logprob(hidden, weight, target)
    new = linear_logprob(hidden.clone().requires_grad_(), weight, target)
    for before, after in zip(old, new, strict=True):
        assert torch.equal(before, after)


def test_peak_memory_does_not_grow_with_rows():
    vocabulary, width, rows = 128256, 256, 256

    def overhead(n):
        hidden, weight, target, gradient = make(n, width, vocabulary, torch.bfloat16)
        hidden.requires_grad_()

        def run():
            result = linear_logprob(hidden, weight, target, chunk_rows=rows)
            torch.autograd.grad(result.logprob_N, hidden, gradient)

        run()
        return peak_bytes(run, hidden.device) - hidden.nbytes

    small, large = overhead(4 * rows), overhead(32 * rows)
    assert large - small < 28 * rows * 256  # [N] vectors; a row of logits is 513,024 bytes
    assert large < 1.1 * rows * vocabulary * 2


def test_target_is_checked_without_waiting_for_the_device():
    hidden, weight, target, _ = make(64, 64, 1000, torch.bfloat16)
    linear_logprob(hidden, weight, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprob(hidden.requires_grad_(), weight, target).logprob_N.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("width", "vocabulary"), [(4096, 128256), (2048, 151936), (576, 49152)])
def test_peaked_rows_to_a_thousandth(width, vocabulary):
    """Top probabilities are 0.01, 0.5 and 0.99 at a logit of 30, on the target or another token."""
    torch.manual_seed(0)
    hidden, weight, target = peaked(
        CHECKED_ROWS, width, vocabulary, torch.device("cuda"), torch.bfloat16
    )
    wide = hidden.double().requires_grad_()
    wanted = linear_logprob_reference(wide, weight.double(), target)[0]
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), wide)
    # This is how the policy calls it; the clone may be overwritten.
    work = hidden.clone().requires_grad_()
    result = linear_logprob(work, weight, target, overwrite_hidden=True)
    assert (result.logprob_N - wanted).abs().max() < 2e-4
    (grad,) = torch.autograd.grad(result.logprob_N.sum(), work)
    error = (grad.double() - wanted_grad).norm(dim=1) / wanted_grad.norm(dim=1)
    assert error.max() < 8e-3


def test_overflowing_rows_in_many_tiles():
    """Targets at log-probabilities far below -60 need a separate exponent in each tile."""
    hidden, weight, target, gradient = make(300, 256, 50257, torch.bfloat16)
    target[:] = (hidden @ weight.t()).argmin(1)
    settings = {"temperature": 0.2}
    wide = hidden.double().requires_grad_()
    outputs = linear_logprob_reference(wide, weight.double(), target, **settings)
    (wanted,) = torch.autograd.grad(outputs[0], wide, gradient.double())
    assert outputs[0].max() < -100
    result = linear_logprob(hidden.requires_grad_(), weight, target, chunk_rows=128, **settings)
    for actual, output in zip(result, outputs, strict=True):
        torch.testing.assert_close(actual.double(), output, rtol=1e-5, atol=1e-3)
    (actual,) = torch.autograd.grad(result.logprob_N, hidden, gradient)
    assert (actual.double() - wanted).abs().max() / wanted.abs().max() < 1e-2


@pytest.mark.parametrize("chunk_rows", [128, 1024])
def test_weights_known_beforehand(chunk_rows):
    hidden, weight, target, gradient = make(700, 256, 50257, torch.bfloat16)
    gradient[::3] = 0.0
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wanted = linear_logprob_reference(*wide, target)[0]
    grads = torch.autograd.grad(wanted, wide, gradient.double())
    total, result = weighted_logprob_sum(hidden, weight, target, gradient, chunk_rows=chunk_rows)
    torch.testing.assert_close(result.logprob_N.double(), wanted, rtol=1e-5, atol=1e-4)
    for actual, expected in zip(torch.autograd.grad(total / 3, leaves), grads, strict=True):
        assert (3 * actual.double() - expected).abs().max() / expected.abs().max() < 2e-2


def test_adapter_on_the_head():
    hidden, weight, target, gradient = make(300, 256, 50257, torch.bfloat16)
    a, b = torch.randn(16, 256, device="cuda"), 0.1 * torch.randn(50257, 16, device="cuda")
    wide = [x.double().requires_grad_() for x in (hidden, a, b)]
    merged = weight.double() + 0.5 * wide[2] @ wide[1]
    grads = torch.autograd.grad(
        linear_logprob_reference(wide[0], merged, target)[0], wide, gradient.double()
    )
    leaves = [x.requires_grad_() for x in (hidden, a, b)]
    out = linear_logprob(hidden, weight, target, lora=HeadLora(a, b, 0.5)).logprob_N
    for actual, expected in zip(torch.autograd.grad(out, leaves, gradient), grads, strict=True):
        assert (actual.double() - expected).norm() / expected.norm() < 3e-2


def test_strided_targets_and_a_broken_head():
    hidden, weight, target, _ = make(300, 256, 50257, torch.bfloat16)
    wanted = linear_logprob(hidden, weight, target).logprob_N
    strided = torch.stack((target, target), 1)[:, 0]
    assert torch.equal(linear_logprob(hidden, weight, strided).logprob_N, wanted)
    weight[7] = float("nan")
    target[target == 7] = 8
    assert linear_logprob(hidden, weight, target).logprob_N.isnan().all()


@pytest.mark.parametrize("rows", [1000, 1025, 2300])
def test_rows_are_the_same_however_tiles_are_grouped(rows):
    from rlsloth.kernels.linear_logprob import triton

    hidden, weight, target, _ = make(rows, 256, 50257, torch.bfloat16)
    results = []
    for row_group in (1, 7, 8, 16, 1000):
        tile = replace(tile_of(hidden.device), row_group=row_group)
        odds = torch.full((rows, 50304), float("nan"), device="cuda").bfloat16()[:, :50257]
        stats = torch.full((4, rows), float("nan"), device="cuda")
        triton.odds(hidden, weight, None, target, odds, stats, 1.0, None, tile)
        results.append((odds, stats))
    assert not results[0][0].isnan().any()
    for odds, stats in results[1:]:
        assert torch.equal(odds, results[0][0])
        assert torch.equal(stats, results[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 70001, 50_000_003])
def test_scaling_by_a_number_on_the_device(count, dtype):
    from rlsloth.kernels.linear_logprob.triton_gradient import scale

    x = torch.randn(count, device="cuda").to(dtype)
    for factor in (1.0, -0.37):
        wanted = (x.float() * factor).to(dtype)
        scale(x, torch.tensor(factor, device="cuda"))
        assert torch.equal(x, wanted)


def test_known_weights_are_scaled_without_waiting_for_the_device():
    hidden, weight, target, gradient = make(300, 256, 50257, torch.bfloat16)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    total, _ = weighted_logprob_sum(hidden, weight, target, gradient)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(total / 3, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("trainable", [False, True])
def test_final_norm(trainable, offset, dtype):
    hidden, weight, target, gradient = make(300, 256, 50257, dtype)
    hidden *= 5
    norm = FinalNorm((1 - offset + 0.3 * torch.randn(256, device="cuda")).to(dtype), 1e-5, offset)
    with torch.no_grad():
        normed = rms_norm(hidden, norm.weight_H, norm.eps, offset)
        wanted = linear_logprob(normed, weight, target, chunk_rows=128)
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    normed = rms_norm_reference(wide[0], norm.weight_H.double(), norm.eps, offset)
    logprob = linear_logprob_reference(normed, wide[1], target)[0]
    grads = torch.autograd.grad(logprob, wide, gradient.double())
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if trainable else [])]
    result = linear_logprob(hidden, weight, target, norm=norm, chunk_rows=128)
    for actual, expected in zip(result, wanted, strict=True):
        assert torch.equal(actual, expected)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for actual, expected in zip(
        torch.autograd.grad(result.logprob_N, leaves, gradient), grads, strict=False
    ):
        assert (actual.double() - expected).norm() / expected.norm() < tolerance
