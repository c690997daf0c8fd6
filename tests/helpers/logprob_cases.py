"""Inputs, expected outputs and tolerances for kernels that compute log-probs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlsloth.kernels.linear_logprob.reference import linear_logprob_reference

CAPPED = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.3}


def make(n, h, v, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) * (3.0 / h**0.5)
    target = torch.randint(0, v, (n,), generator=generator)
    gradient = torch.randn(n, generator=generator)
    return hidden.to(dtype), weight.to(dtype), target, gradient


def expected(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    gradient: Tensor,
    bias: Tensor | None = None,
    **settings: Any,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute outputs, then gradients of hidden, weight and bias, in float64."""
    given = [x for x in (hidden, weight, bias) if x is not None]
    leaves = [x.detach().double().requires_grad_() for x in given]
    bias_V = None if bias is None else leaves[2]
    outputs = linear_logprob_reference(leaves[0], leaves[1], target, bias_V=bias_V, **settings)
    return outputs, torch.autograd.grad(outputs[0], leaves, gradient.double())


def close(actual, wanted, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)
