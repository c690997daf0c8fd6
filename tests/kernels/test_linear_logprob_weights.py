"""linear_logprob with upstream gradients known beforehand, and with overwritten hidden states."""

import math

import pytest
import torch

from helpers.logprob_cases import CAPPED, close, expected, make
from rlsloth.kernels.linear_logprob.op import HeadLora, linear_logprob, weighted_logprob_sum
from rlsloth.kernels.linear_logprob.reference import linear_logprob_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_may_be_overwritten(dtype):
    hidden, weight, target, gradient = make(21, 16, 777, dtype)
    grads = []
    for overwrite in (False, True):
        leaf = hidden.clone().requires_grad_()
        result = linear_logprob(leaf, weight, target, chunk_rows=8, overwrite_hidden=overwrite)
        (grad,) = torch.autograd.grad(result.logprob_N, leaf, gradient)
        assert (grad.data_ptr() == leaf.data_ptr()) == overwrite
        grads.append(grad)
    assert torch.equal(*grads)


def test_overwriting_what_the_producer_needs_is_an_error():
    hidden, weight, target, _ = make(5, 8, 33)
    produced = hidden.requires_grad_().exp()  # exp's backward reads its result
    result = linear_logprob(produced, weight, target, overwrite_hidden=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.logprob_N.sum().backward()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("settings", [{}, CAPPED])
@pytest.mark.parametrize("chunk_rows", [8, 64])
def test_weights_known_beforehand(chunk_rows, settings, trainable):
    hidden, weight, target, gradient = make(37, 24, 1009)
    gradient[::3] = 0.0
    bias = torch.randn(1009)
    outputs, grads = expected(hidden, weight, target, gradient, bias, **settings)
    leaves = [hidden, *([weight, bias] if trainable else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    total, result = weighted_logprob_sum(
        hidden, weight, target, gradient, bias_V=bias, chunk_rows=chunk_rows, **settings
    )
    for actual, wanted in zip(result, outputs, strict=True):
        close(actual, wanted)
        assert not actual.requires_grad
    close(total, (outputs[0] * gradient.double()).sum())
    actual_grads = torch.autograd.grad(2.0 * total, leaves, retain_graph=True)
    for actual, wanted in zip(actual_grads, grads[: len(leaves)], strict=True):
        close(actual, 2.0 * wanted)
    assert not actual_grads[0][::3].any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, leaves)


def test_upstream_is_not_rounded_to_sixteen_bits():
    hidden, weight, target, gradient = make(21, 16, 301, torch.bfloat16)
    hidden.requires_grad_()
    grads = []
    for upstream in (1.0, 1.0117):
        total, _ = weighted_logprob_sum(hidden, weight, target, gradient)
        grads.append(torch.autograd.grad(upstream * total, hidden)[0].double())
    ratio = (grads[1].abs().sum() / grads[0].abs().sum()).item()
    assert ratio == pytest.approx(1.0117, rel=1e-3)  # 1.0117 rounds to 1.0156


def test_weights_known_beforehand_without_gradient():
    hidden, weight, target, gradient = make(21, 16, 301)
    gradient[3] = 0.0
    hidden[3] = math.nan  # left out by its weight
    hidden.requires_grad_()
    with torch.no_grad():
        total, _ = weighted_logprob_sum(hidden, weight, target, gradient)
    assert not total.requires_grad
    with_gradient, _ = weighted_logprob_sum(hidden, weight, target, gradient)
    assert total.item() == with_gradient.item()
    (grad,) = torch.autograd.grad(with_gradient, hidden)
    assert grad.isfinite().all()


def test_autocast_changes_nothing():
    hidden, weight, target, gradient = make(21, 16, 301)
    leaf = hidden.requires_grad_()
    wanted = torch.autograd.grad(linear_logprob(leaf, weight, target).logprob_N, leaf, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(leaf, weight, target)
    assert torch.equal(torch.autograd.grad(out.logprob_N, leaf, gradient)[0], wanted[0])


def test_masked_vocabulary():
    hidden, weight, target, _ = make(7, 16, 301)
    bias = torch.zeros(301)
    bias[target.max() + 1 :] = -math.inf
    wanted = linear_logprob_reference(
        hidden.double(), weight.double(), target, bias_V=bias.double()
    )
    for actual, expected_output in zip(
        linear_logprob(hidden, weight, target, bias_V=bias), wanted, strict=True
    ):
        close(actual, expected_output)


@pytest.mark.parametrize("rows", [0, 5])
def test_no_weight_at_all(rows):
    hidden, weight, target, _ = make(rows, 8, 33)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    total, _ = weighted_logprob_sum(hidden, weight, target, torch.zeros(rows))
    assert total.item() == 0.0
    for leaf, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [False, True])
def test_adapter_on_the_head(known, dtype):
    hidden, weight, target, gradient = make(21, 16, 301, dtype)
    a, b = torch.randn(8, 16), torch.randn(301, 8)
    wide = [x.double().requires_grad_() for x in (hidden, a, b)]
    merged = weight.double() + 0.5 * wide[2] @ wide[1]
    wanted = linear_logprob_reference(wide[0], merged, target)[0]
    wanted_grads = torch.autograd.grad(wanted, wide, gradient.double())
    leaves = [x.requires_grad_() for x in (hidden, a, b)]
    lora = HeadLora(a, b, 0.5)
    if known:
        loss, out = weighted_logprob_sum(hidden, weight, target, gradient, lora=lora, chunk_rows=8)
        logprob = out.logprob_N
    else:
        logprob = linear_logprob(hidden, weight, target, lora=lora, chunk_rows=8).logprob_N
        loss = (logprob * gradient).sum()
    # In 16 bits the adapter's output is rounded before the product.
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    close(logprob, wanted, tolerance)
    for actual, expected_grad in zip(torch.autograd.grad(loss, leaves), wanted_grads, strict=True):
        assert (actual - expected_grad).norm() < tolerance * expected_grad.norm()
