"""Other projects' selected log-probs with a frozen head, forward and backward, for the bench.

Only their public entry points are called.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from rlsloth.kernels.measure import Run


def peers(
    hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, gradient_N: Tensor
) -> dict[str, Callable[[], Run]]:
    """Return functions that prepare a peer's run, by name."""
    makers: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
        "Unsloth": _unsloth,
        "TRL chunked": _trl,
        "Liger, no reduction": _liger,
        "Cut Cross Entropy, exact": _cce,
        "torch, float32 logits": _torch,
    }

    def prepare(make: Callable[..., Callable[[Tensor], Tensor]]) -> Run:
        logprob_of = make(weight_VH, target_N)

        def run() -> None:
            hidden = hidden_NH.detach().requires_grad_()
            torch.autograd.grad(logprob_of(hidden), hidden, gradient_N)

        return run

    return {name: partial(prepare, make) for name, make in makers.items()}


def _unsloth(weight_VH: Tensor, target_N: Tensor) -> Callable[[Tensor], Tensor]:
    os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")  # else its parts refuse to be imported
    fused_linear_logprobs = import_module(
        "unsloth_zoo.fused_losses.fused_linear"
    ).fused_linear_logprobs

    def logprob(hidden_NH: Tensor) -> Tensor:
        out: Tensor = fused_linear_logprobs(hidden_NH, weight_VH, target_N)
        return out

    return logprob


def _trl(weight_VH: Tensor, target_N: Tensor) -> Callable[[Tensor], Tensor]:
    apply = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
    return lambda hidden_NH: apply(hidden_NH, weight_VH, None, target_N, 1.0, 32768, None, 1.0, ())[
        0
    ]


def _liger(weight_VH: Tensor, target_N: Tensor) -> Callable[[Tensor], Tensor]:
    module = import_module("liger_kernel.ops.fused_linear_cross_entropy")
    apply = module.LigerFusedLinearCrossEntropyFunction.apply
    return lambda hidden_NH: (
        -apply(hidden_NH, weight_VH, target_N, None, None, -100, 0.0, 0.0, "none")[0]
    )


def _cce(weight_VH: Tensor, target_N: Tensor) -> Callable[[Tensor], Tensor]:
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden_NH: (
        -linear_cross_entropy(hidden_NH, weight_VH, target_N, reduction="none", filter_eps=None)
    )


def _torch(weight_VH: Tensor, target_N: Tensor) -> Callable[[Tensor], Tensor]:
    def logprob(hidden_NH: Tensor) -> Tensor:
        logits_NV = (hidden_NH @ weight_VH.t()).float()
        return logits_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0]

    return logprob
