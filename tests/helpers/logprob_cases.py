"""Inputs, expected outputs and tolerances for kernels that compute log-probs."""

import torch

from rlsloth.kernels.linear_logprob.reference import linear_logprob_reference

CAPPED = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.3}


def make(n, h, v, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) * (3.0 / h**0.5)
    target = torch.randint(0, v, (n,), generator=generator)
    gradient = torch.randn(n, generator=generator)
    return hidden.to(dtype), weight.to(dtype), target, gradient


def expected(hidden, weight, target, gradient, bias=None, **settings):
    """Compute outputs, then gradients of hidden, weight and bias, in float64."""
    inputs = [None if x is None else x.detach().double() for x in (hidden, weight, bias)]
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    outputs = linear_logprob_reference(inputs[0], inputs[1], target, bias_V=inputs[2], **settings)
    return outputs, torch.autograd.grad(outputs[0], leaves, gradient.double())


def close(actual, wanted, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)
