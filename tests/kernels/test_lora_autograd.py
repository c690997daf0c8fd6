"""kernels/lora under autograd: saved tensors, second passes, activation checkpointing."""

import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.lora_layers import (
    BIASED,
    LEARNT,
    NF4,
    OFF,
    OFF_NF4,
    PLAIN,
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
)
from rlsloth.kernels.lora import autograd as autograd_module
from rlsloth.kernels.lora import layer as layer_module
from rlsloth.kernels.lora import mlp as mlp_module
from rlsloth.kernels.lora.op import lora_linears, lora_mlp

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("run", [siblings, mlp()])
def test_only_the_adapters_are_differentiated(run):
    """The input needs no gradient in the first layer, where it is an embedding's output."""
    layers = make_mlp((NF4, NF4, NF4))[: 2 if run is siblings else 3]
    x = input_like(10, 64)
    with_x = x.clone().requires_grad_()
    outputs, others = run(x, layers), run(with_x, layers)
    ones = [torch.ones_like(y) for y in outputs]
    grads = torch.autograd.grad(outputs, parameters(layers), ones)
    wanted = torch.autograd.grad(others, parameters(layers), ones)
    assert all(torch.equal(*pair) for pair in zip(grads, wanted, strict=True))


def test_strided_inputs_and_gradients():
    layers = make_mlp((NF4, PLAIN, NF4))
    x = input_like(64, 14).t()
    check(mlp(), mlp_reference(), layers, x)
    leaf = x.detach().requires_grad_()
    grads = []
    for gradient in (torch.ones(1, 1).expand(14, 64), torch.ones(64, 14).t()):
        y = lora_mlp(leaf, *layers, "silu")
        grads.append(torch.autograd.grad(y, [leaf, *parameters(layers)], gradient))
    for pair in zip(*grads, strict=True):
        torch.testing.assert_close(*pair)


def test_an_mlp_is_differentiated_once():
    layers, x = make_mlp((NF4, NF4, NF4)), input_like(4, 64).requires_grad_()
    y = lora_mlp(x, *layers, "silu")
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)
    (y,) = lora_linears(x, (layers[0],))  # holds its saved tensors
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])


@pytest.mark.parametrize("run", [siblings, mlp()])
def test_a_weight_changed_in_between_is_noticed(run):
    layers = make_mlp((LEARNT, LEARNT, LEARNT))[: 2 if run is siblings else 3]
    y = run(input_like(4, 64).requires_grad_(), layers)[0]
    with torch.no_grad():
        layers[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), layers[0].weight)


@pytest.mark.parametrize("run", [siblings, mlp()])
def test_an_adapter_changed_in_between_is_noticed(run):
    layers = make_mlp((NF4, NF4, NF4))[: 2 if run is siblings else 3]
    x = input_like(4, 64).requires_grad_()
    y = run(x, layers)[0]
    with torch.no_grad():
        layers[0].lora_b.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("kind", [NF4, LEARNT])
def test_checkpointing_does_not_run_down_again(monkeypatch, kind):
    layers = make_mlp((kind, kind, kind))
    runs = []
    outer = mlp_module.outer

    def counted(*arguments):
        runs.append(1)
        return outer(*arguments)

    monkeypatch.setattr(mlp_module, "outer", counted)
    x = input_like(20, 64).requires_grad_()
    y = checkpoint(lambda x: x + lora_mlp(x, *layers, "silu"), x, use_reentrant=False)
    y.sum().backward()
    assert len(runs) == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kinds", [(NF4, PLAIN, NF4), (LEARNT, LEARNT, LEARNT)])
def test_under_activation_checkpointing(reentrant, kinds):
    layers = make_mlp(kinds)
    x = input_like(20, 64).requires_grad_()

    def run(x):
        up, _ = lora_linears(x, (layers[0], layers[1]))
        return lora_mlp(x, *layers, "silu") + up.sum()

    wanted = torch.autograd.grad(run(x).square().sum(), [x, *parameters(layers)])
    y = checkpoint(run, x, use_reentrant=reentrant)
    y.square().sum().backward()
    for leaf, grad in zip([x, *parameters(layers)], wanted, strict=True):
        close(leaf.grad, grad.double())  # shared adapters: the order of two parts is free


@pytest.mark.parametrize("kind", [NF4, LEARNT])
def test_with_and_without_gradient_bitwise_the_same(kind):
    layers = make_mlp((kind, kind, kind))
    x = input_like(300, 64)  # more rows than are decoded without dequantising
    with torch.no_grad():
        old = [lora_mlp(x, *layers, "silu"), *lora_linears(x, tuple(layers[:2]))]
    new = [lora_mlp(x, *layers, "silu"), *lora_linears(x, tuple(layers[:2]))]
    assert all(y.requires_grad for y in new)
    assert all(torch.equal(*pair) for pair in zip(old, new, strict=True))


def test_no_uninitialised_memory_is_read(monkeypatch):
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            result = allocate(*args, **kwargs)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        monkeypatch.setattr(torch, name, poisoned)
    allocate = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **kw: allocate(*args, **kw).fill_(float("nan"))
    )
    for kinds in ((NF4, NF4, NF4), (PLAIN, BIASED, PLAIN), (OFF_NF4, NF4, OFF), (LEARNT,) * 3):
        layers = make_mlp(kinds)
        check(mlp(), mlp_reference(), layers, input_like(30, 64))
        check(siblings, siblings_reference, layers[:2], input_like(30, 64))


def test_checkpointing_lets_go_of_adapter_copies(monkeypatch):
    made = []

    def watched(layers):
        stacked = layer_module.stack(layers)
        made.append(weakref.ref(stacked.a_RI))
        return stacked

    monkeypatch.setattr(autograd_module, "stack", watched)
    monkeypatch.setattr(mlp_module, "stack", watched)
    siblings, mlp = (make(64, 64), make(64, 64, seed=1)), make_mlp((PLAIN,) * 3)

    def block(x):
        return lora_mlp(x + sum(lora_linears(x, siblings)), *mlp, "silu")

    x = torch.randn(300, 64, requires_grad=True)
    plain = block(x)
    assert [copy() is not None for copy in made] == [True] * 3  # they are kept for the backward
    made.clear()
    kept = checkpoint(block, x, use_reentrant=False)
    assert [copy() for copy in made] == [None] * 3
    plain.sum().backward()
    want, x.grad = x.grad, None
    made.clear()
    kept.sum().backward()
    assert torch.equal(x.grad, want)
    assert [copy() for copy in made] == [None] * 3
