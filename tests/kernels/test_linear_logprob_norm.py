"""linear_logprob with the final norm inside its chunks, compared with the norm applied before."""

import pytest
import torch

from helpers.logprob_cases import CAPPED, close, make
from rlsloth.kernels.linear_logprob.norm import FinalNorm
from rlsloth.kernels.linear_logprob.op import HeadLora, linear_logprob, weighted_logprob_sum
from rlsloth.kernels.linear_logprob.reference import linear_logprob_reference
from rlsloth.kernels.measure import peak_bytes
from rlsloth.kernels.rms_norm.op import rms_norm
from rlsloth.kernels.rms_norm.reference import rms_norm_reference

EPS = 1e-5


def make_norm(width, offset=0.0, dtype=torch.float32):
    weight = torch.randn(width, generator=torch.Generator().manual_seed(7)) * 0.3
    return FinalNorm((weight + 1 - offset).to(dtype), EPS, offset)


def expected(hidden, weight, target, gradient, norm, **settings):
    """Return float64 outputs, then gradients of the un-normed hidden states and of the weight."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    normed = rms_norm_reference(leaves[0], norm.weight_H.double(), norm.eps, norm.offset)
    outputs = linear_logprob_reference(normed, leaves[1], target, **settings)
    return outputs, torch.autograd.grad(outputs[0], leaves, gradient.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("chunk_rows", [None, 1, 8])
def test_logprobs_are_bitwise_those_of_normed_hidden_states(chunk_rows, offset, dtype):
    hidden, weight, target, _ = make(21, 24, 301, dtype)
    hidden *= 5
    norm = make_norm(24, offset, dtype)
    normed = rms_norm(hidden, norm.weight_H, EPS, offset)
    wanted = linear_logprob(normed, weight, target, chunk_rows=chunk_rows)
    for leaf in (hidden.clone(), hidden.clone().requires_grad_()):
        result = linear_logprob(leaf, weight, target, norm=norm, chunk_rows=chunk_rows)
        for actual, output in zip(result, wanted, strict=True):
            assert torch.equal(actual, output)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("settings", [{}, CAPPED])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradients_equal_float64(offset, settings, trainable, known):
    check_gradients(offset, settings, trainable, known, torch.float32)


def check_gradients(offset, settings, trainable, known, dtype):
    hidden, weight, target, gradient = make(37, 24, 300, dtype)
    hidden *= 5
    if known:
        gradient[::3] = 0.0
    norm = make_norm(24, offset)
    outputs, grads = expected(hidden, weight, target, gradient, norm, **settings)
    leaves = [hidden, *([weight] if trainable else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    if known:
        loss, result = weighted_logprob_sum(
            hidden, weight, target, gradient, norm=norm, chunk_rows=8, **settings
        )
    else:
        result = linear_logprob(hidden, weight, target, norm=norm, chunk_rows=8, **settings)
        loss = (result.logprob_N * gradient).sum()
    exact = dtype == torch.float32
    for actual, wanted in zip(result, outputs, strict=True):
        close(actual, wanted, 1e-5 if exact else 5e-2)  # the normed rows are rounded
    for actual, wanted in zip(torch.autograd.grad(loss, leaves), grads, strict=False):
        assert actual.dtype == dtype
        error = (actual.double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if exact else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_may_be_overwritten(dtype):
    hidden, weight, target, gradient = make(21, 16, 304, dtype)
    norm, grads = make_norm(16), []
    for overwrite in (False, True):
        leaf = hidden.clone().requires_grad_()
        result = linear_logprob(
            leaf, weight, target, norm=norm, chunk_rows=8, overwrite_hidden=overwrite
        )
        (grad,) = torch.autograd.grad(result.logprob_N, leaf, gradient)
        assert (grad.data_ptr() == leaf.data_ptr()) == overwrite
        grads.append(grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("trainable", [False, True])
def test_no_rows(trainable):
    hidden, weight, target, _ = make(0, 8, 33)
    leaves = [hidden.requires_grad_(), *([weight.requires_grad_()] if trainable else [])]
    result = linear_logprob(hidden, weight, target, norm=make_norm(8))
    for leaf, grad in zip(leaves, torch.autograd.grad(result.logprob_N.sum(), leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_normed_hidden_states_exist_for_one_chunk_at_a_time():
    vocabulary, width, rows = 2003, 256, 16

    def overhead(n):
        hidden, weight, target, gradient = make(n, width, vocabulary)
        hidden.requires_grad_()
        norm = make_norm(width)

        def run():
            result = linear_logprob(
                hidden, weight, target, norm=norm, chunk_rows=rows, overwrite_hidden=True
            )
            torch.autograd.grad(result.logprob_N, hidden, gradient)

        return peak_bytes(run, hidden.device)

    # [N] vectors, a few hundred bytes a row; a row of hidden states is 1024.
    assert overhead(32 * rows) - overhead(4 * rows) < 28 * rows * 256


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight_H": torch.ones(5)}, ValueError, r"norm.weight_H is \[5\], expected \[4\]"),
        ({"weight_H": torch.ones(4, device="meta")}, ValueError, "norm.weight_H is on meta"),
        ({"weight_H": torch.ones(4).half()}, TypeError, "norm.weight_H is torch.float16, expected"),
        ({"weight_H": torch.ones(4, requires_grad=True)}, ValueError, "weight_H requires grad"),
        ({"lora": HeadLora(torch.ones(2, 4), torch.ones(9, 2), 1.0)}, ValueError, "norm and lora"),
    ],
)
@pytest.mark.parametrize("rows", [0, 3])
def test_bad_norms_are_named(rows, change, error, message):
    hidden, weight, target, gradient = make(rows, 4, 9)
    norm = FinalNorm(change.get("weight_H", torch.ones(4)), EPS)
    lora = change.get("lora")
    with pytest.raises(error, match=message) as caught:
        linear_logprob(hidden, weight, target, norm=norm, lora=lora)
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=message):
        weighted_logprob_sum(hidden, weight, target, gradient, norm=norm, lora=lora)
