"""kernels/linear_logprob on a CPU: the torch path, and the Triton kernel interpreted."""

import math

import pytest
import torch

from helpers.logprob_cases import CAPPED, close, expected, make
from rlsloth.kernels.linear_logprob import op
from rlsloth.kernels.linear_logprob.op import linear_logprob
from rlsloth.kernels.measure import peak_bytes

SETTINGS = [
    {},
    {"temperature": 0.6},
    {"logit_scale": 0.25},
    {"logit_scale": -0.7},
    {"softcap": 8.0},
    CAPPED,
]


@pytest.mark.parametrize("vocabulary", [2, 97, 1000, 8193, 50257, 128256, 151936])
def test_outputs_and_gradient_equal_float64(vocabulary):
    hidden, weight, target, gradient = make(13, 17, vocabulary)
    outputs, (grad_hidden, _) = expected(hidden, weight, target, gradient)
    hidden.requires_grad_()
    result = linear_logprob(hidden, weight, target, chunk_rows=5)
    for actual, wanted in zip(result, outputs, strict=True):
        assert actual.dtype == torch.float32
        close(actual, wanted)
    assert not result.entropy_N.requires_grad
    assert not result.logsumexp_N.requires_grad
    close(torch.autograd.grad(result.logprob_N, hidden, gradient)[0], grad_hidden)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_and_trainable_head(settings, with_bias, trainable):
    hidden, weight, target, gradient = make(37, 24, 1009)
    bias = torch.randn(1009) if with_bias else None
    target[0] = (hidden[0] @ weight.t()).argmax()
    outputs, grads = expected(hidden, weight, target, gradient, bias, **settings)
    leaves = [hidden, *([weight, *([bias] if with_bias else [])] if trainable else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    result = linear_logprob(hidden, weight, target, bias_V=bias, chunk_rows=16, **settings)
    for actual, wanted in zip(result, outputs, strict=True):
        close(actual, wanted)
    actual_grads = torch.autograd.grad(result.logprob_N, leaves, gradient)
    for actual, wanted in zip(actual_grads, grads[: len(leaves)], strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_keep_float32_logprobs(dtype):
    # More rows of weight than are upcast at a time, so that the product is summed over blocks.
    hidden, weight, target, gradient = make(19, 32, 9001, dtype)
    outputs, grads = expected(hidden, weight, target, gradient)
    hidden.requires_grad_()
    for trainable in (False, True):
        weight.requires_grad_(trainable)
        result = linear_logprob(hidden, weight, target, chunk_rows=8)
        for actual, wanted in zip(result, outputs, strict=True):
            close(actual, wanted)
        leaves = [hidden, weight] if trainable else [hidden]
        rounding = 2 * torch.finfo(dtype).eps
        for actual, wanted in zip(
            torch.autograd.grad(result.logprob_N, leaves, gradient), grads, strict=False
        ):
            assert actual.dtype == dtype
            close(actual, wanted, rounding)


def identity_head(logits):
    """Return a head that reproduces the logits exactly."""
    return logits.clone().requires_grad_(), torch.eye(logits.shape[1])


def test_extreme_logits_and_ties():
    logits = torch.zeros(6, 300)
    logits[0, 7] = 1e4  # the target has all probability
    logits[1, 8] = 1e4  # another token has all probability
    logits[2] = -1e4
    logits[3] = 1e4  # all equal, at both ends
    logits[4, ::2] = -1e4
    logits[4, 1::2] = 1e4
    logits[5, 7] = 40.0  # p_target rounds to 1 in float32; log-prob and gradient must not
    target = torch.full((6,), 7)
    gradient = torch.ones(6)
    outputs, (wanted, _) = expected(logits, torch.eye(300), target, gradient)
    hidden, weight = identity_head(logits)
    result = linear_logprob(hidden, weight, target, chunk_rows=4)
    for actual, output in zip(result, outputs, strict=True):
        torch.testing.assert_close(actual.double(), output, rtol=1e-5, atol=1e-15)
    (actual,) = torch.autograd.grad(result.logprob_N, hidden, gradient)
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-15)
    # float64 itself keeps two digits of the certain row's 1 - p_target = 1.27e-15.
    certain = 299 * math.exp(-40.0)
    assert result.logprob_N[5].item() == pytest.approx(-certain, rel=1e-5)
    assert actual[5, 7].item() == pytest.approx(certain, rel=1e-5)


@pytest.mark.parametrize(("n", "v"), [(1, 50), (3, 1), (1, 1)])
def test_one_row_and_one_token_vocabulary(n, v):
    hidden, weight, target, gradient = make(n, 4, v)
    outputs, (wanted, _) = expected(hidden, weight, target, gradient)
    hidden.requires_grad_()
    result = linear_logprob(hidden, weight, target)
    for actual, output in zip(result, outputs, strict=True):
        close(actual, output)
    close(torch.autograd.grad(result.logprob_N, hidden, gradient)[0], wanted)


@pytest.mark.parametrize("trainable", [False, True])
def test_no_rows(trainable):
    hidden, weight, target, _ = make(0, 8, 33)
    hidden.requires_grad_()
    weight.requires_grad_(trainable)
    result = linear_logprob(hidden, weight, target)
    assert [x.shape for x in result] == [(0,)] * 3
    result.logprob_N.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)
    if trainable:
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_policy_ratio_is_exactly_one(dtype):
    hidden, weight, target, _ = make(101, 48, 5003, dtype)
    with torch.no_grad():
        old = linear_logprob(hidden, weight, target, chunk_rows=32)
    frozen = linear_logprob(hidden.clone().requires_grad_(), weight, target, chunk_rows=32)
    trained = linear_logprob(
        hidden.clone().requires_grad_(),
        weight.clone().requires_grad_(),
        target,
        chunk_rows=32,
    )
    for new in (frozen, trained):
        for before, after in zip(old, new, strict=True):
            assert torch.equal(before, after)
        assert torch.equal(torch.exp(new.logprob_N - old.logprob_N), torch.ones(101))


def test_gradients_are_deterministic():
    grads = []
    for _ in range(2):
        hidden, weight, target, gradient = make(70, 40, 3001)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        result = linear_logprob(hidden, weight, target, chunk_rows=32)
        grads.append(torch.autograd.grad(result.logprob_N, leaves, gradient))
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("settings", [{}, CAPPED])
def test_no_uninitialised_memory_is_read(monkeypatch, settings):
    hidden, weight, target, gradient = make(21, 16, 777)
    outputs, grads = expected(hidden, weight, target, gradient, **settings)
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            return allocate(*args, **kwargs).fill_(float("nan"))

        monkeypatch.setattr(torch, name, poisoned)
    hidden.requires_grad_()
    for trainable in (False, True):
        weight.requires_grad_(trainable)
        result = linear_logprob(hidden, weight, target, chunk_rows=8, **settings)
        for actual, wanted in zip(result, outputs, strict=True):
            close(actual, wanted)
        close(torch.autograd.grad(result.logprob_N, hidden, gradient)[0], grads[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_does_not_grow_with_rows(dtype):
    """The allocator's peak is about one chunk, besides inputs, gradient and outputs."""
    vocabulary, width, rows = 20011, 32, 16

    def overhead(n):
        hidden, weight, target, gradient = make(n, width, vocabulary, dtype)
        hidden.requires_grad_()

        def run():
            result = linear_logprob(hidden, weight, target, chunk_rows=rows)
            torch.autograd.grad(result.logprob_N, hidden, gradient)

        run()
        return peak_bytes(run, hidden.device) - hidden.nbytes

    small, large = overhead(4 * rows), overhead(32 * rows)
    # Only [N] vectors grow: a few hundred bytes per row. A row of logits takes 80,000.
    assert large - small < 28 * rows * 256
    # The chunk's logits and exponentials, and the upcast block of a 16-bit weight.
    upcast = 0 if dtype == torch.float32 else 4 * width * vocabulary
    assert rows * vocabulary * 4 < large < 2 * rows * vocabulary * 4 + upcast + 2**18


def test_a_graph_is_differentiated_once():
    hidden, weight, target, gradient = make(5, 8, 33)
    hidden.requires_grad_()
    logprob = linear_logprob(hidden, weight, target).logprob_N
    torch.autograd.grad(logprob, hidden, gradient, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logprob, hidden, gradient)


def test_strided_inputs():
    hidden, weight, target, gradient = make(12, 16, 129)
    outputs, (wanted, _) = expected(hidden, weight, target, gradient)
    hidden = hidden.t().contiguous().t().requires_grad_()
    result = linear_logprob(hidden, weight.t().contiguous().t(), target, chunk_rows=5)
    close(result.logprob_N, outputs[0])
    close(torch.autograd.grad(result.logprob_N, hidden, gradient)[0], wanted)


def test_default_chunk_stays_within_its_scratch():
    for vocabulary in (2, 50257, 128256, 262144, 10**9):
        cpu = op.most_rows(vocabulary, torch.device("cpu"), fused=False)
        assert cpu == 1 or 8 * cpu * vocabulary <= op.CPU_SCRATCH_BYTES
        for fused, size in ((True, 2), (False, 10)):
            gpu = op.most_rows(vocabulary, torch.device("cuda"), fused)
            assert gpu == 128 or size * gpu * vocabulary <= op.GPU_SCRATCH_BYTES
            assert gpu % 128 == 0
