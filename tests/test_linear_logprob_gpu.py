"""kernels/linear_logprob on a CUDA GPU: cuBLAS products and the compiled Triton row pass."""

import pytest
import torch

from rlsloth.kernels.linear_logprob.bench import peak_bytes
from rlsloth.kernels.linear_logprob.op import linear_logprob
from rlsloth.kernels.linear_logprob.reference import linear_logprob_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CAPPED = {"temperature": 0.7, "softcap": 20.0, "logit_scale": 1.3}


def make(n, h, v, dtype, seed=0):
    """Inputs whose logits reach about +-30."""
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
            # A sum's rounding scales with its largest terms, not with what is left of it.
            error = (actual.double() - wanted).abs().max() / wanted.abs().max()
            assert error.item() < rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_direction_in_place_is_free_of_races(dtype):
    """Rows overwrite their own logits in 16 bits: many rows, many times, bitwise the same."""
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
    assert large < 1.1 * rows * vocabulary * 4


def test_target_is_checked_without_waiting_for_the_device():
    hidden, weight, target, _ = make(64, 64, 1000, torch.bfloat16)
    linear_logprob(hidden, weight, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprob(hidden.requires_grad_(), weight, target).logprob_N.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
