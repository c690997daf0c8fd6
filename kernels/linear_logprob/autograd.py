"""Gradients of linear_logprob: a row scale for a frozen head, two more products for a trained one.

With p the softmax over the tokens other than the target, ``dlogp/dz = -(1 - exp(logp)) * (p -
onehot(target))``. The *direction* is ``p - onehot(target)`` times the head: p enters the products
as odds, and the target's row of the head is subtracted in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from rlsloth.kernels.linear_logprob.odds import (
    Head,
    chunks,
    coefficient,
    empty_stats,
    outputs,
)
from rlsloth.kernels.linear_logprob.products import add_transposed, multiply


class FrozenHead(torch.autograd.Function):
    """Autograd for a frozen head: the backward scales rows of the forward's direction [N, H]."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, target_N: Tensor, head: Head, overwrite: bool
    ) -> tuple[Tensor, ...]:
        stats_4N = empty_stats(hidden_NH)
        direction_NH = hidden_NH if overwrite else _contiguous_like(hidden_NH)
        for rows, _, odds_RV in chunks(head, hidden_NH, target_N, stats_4N):
            sum_RH = multiply(odds_RV, head.weight_VH)
            stats_4R, out_RH = stats_4N[:, rows], direction_NH[rows]
            _finish(head, sum_RH, target_N[rows], stats_4R, hidden_NH[rows], out_RH)
        if overwrite:
            increment_version(hidden_NH)
        result = outputs(stats_4N)
        ctx.head = head
        ctx.save_for_backward(direction_NH, coefficient(result[0], head))
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        direction_NH, coefficient_N = ctx.saved_tensors
        # In place: at long context a second [N, H] would be the largest tensor here. A second
        # backward through the same graph trips autograd's version check.
        _scale_rows(ctx.head, direction_NH, grad_N * coefficient_N)
        increment_version(direction_NH)
        return direction_NH, None, None, None


class TrainableHead(torch.autograd.Function):
    """Autograd for a trained head: the backward recomputes the odds, four products in total.

    ``trained_VK`` holds the head's last K columns, which need a gradient: all columns, or a LoRA's
    second factor next to the frozen weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        trained_VK: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        head: Head,
    ) -> tuple[Tensor, ...]:
        stats_4N = empty_stats(hidden_NH)
        for _ in chunks(head, hidden_NH, target_N, stats_4N):
            pass
        result = outputs(stats_4N)
        # Saved although head holds them too, so that autograd notices a change in between.
        ctx.save_for_backward(hidden_NH, trained_VK, bias_V, target_N, coefficient(result[0], head))
        ctx.head = head
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, trained_VK, _, target_N, coefficient_N = ctx.saved_tensors
        grads = _Gradients(ctx.head, hidden_NH, trained_VK.shape[1], ctx.needs_input_grad)
        stats_4N = empty_stats(hidden_NH)
        scale_N = grad_N * coefficient_N
        for rows, input_RH, odds_RV in chunks(ctx.head, hidden_NH, target_N, stats_4N):
            stats_4R = stats_4N[:, rows]
            grads.add(rows, input_RH, odds_RV, target_N[rows], stats_4R, scale_N[rows])
        return *grads.results(), None, None


class WeightedSum(torch.autograd.Function):
    """``sum(weight_n * logp_n)`` and its gradients in one pass: three products for a trained head.

    A frozen head takes one product for every row and a second one for rows of nonzero weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        trained_VK: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        row_weight_N: Tensor,
        head: Head,
        with_gradients: bool,
    ) -> tuple[Tensor, ...]:
        # Rows of weight 0 go last: whole chunks of them need no gradient.
        active = int(torch.count_nonzero(row_weight_N))
        order_N = None
        if 0 < active < len(row_weight_N):
            order_N = torch.argsort((row_weight_N == 0).to(torch.int8), stable=True)
        sorted_NH, target_N, sorted_weight_N = (
            x if order_N is None else x.index_select(0, order_N)
            for x in (hidden_NH, target_N, row_weight_N)
        )
        stats_4N = empty_stats(hidden_NH)
        needs = tuple(with_gradients and need for need in ctx.needs_input_grad)
        grads = _Gradients(head, sorted_NH, trained_VK.shape[1], needs)
        for rows, input_RH, odds_RV in chunks(head, sorted_NH, target_N, stats_4N):
            kept = slice(rows.start, max(rows.start, min(rows.stop, active)))
            count = kept.stop - kept.start
            if count and any(needs):
                stats_4R = stats_4N[:, kept]
                scale_R = sorted_weight_N[kept] * coefficient(outputs(stats_4R)[0], head)
                grads.add(
                    kept, input_RH[:count], odds_RV[:count], target_N[kept], stats_4R, scale_R
                )
        grad_hidden, grad_trained, grad_bias = grads.results()
        if grad_hidden is not None:
            grad_hidden[active:] = 0.0
        result: tuple[Tensor, ...] = outputs(stats_4N)
        if order_N is not None:
            result = tuple(torch.empty_like(x).index_copy_(0, order_N, x) for x in result)
            if grad_hidden is not None:  # overwrites the sorted copy
                grad_hidden = sorted_NH.index_copy_(0, order_N, grad_hidden)
        ctx.head = head
        ctx.save_for_backward(grad_hidden, grad_trained, grad_bias)
        ctx.mark_non_differentiable(*result)
        # Rows of weight 0 are left out: their values may be NaN.
        terms_N = torch.where(row_weight_N == 0, 0.0, result[0] * row_weight_N)
        return terms_N.sum(), *result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        for tensor in saved:
            if tensor is not None:
                _scale(ctx.head, tensor, grad)
        return *saved, None, None, None, None


class _Gradients:
    """Gradients of the hidden states, of the head's trained last columns and of the bias."""

    def __init__(
        self,
        head: Head,
        hidden_NH: Tensor,
        columns: int,
        needs: tuple[bool, ...],
    ) -> None:
        self.head, self.hidden_NH, self.columns = head, hidden_NH, columns
        self.hidden = _contiguous_like(hidden_NH) if needs[0] else None
        self.needs_trained, self.needs_bias = needs[1], needs[2]
        # Sums over several chunks are kept in float32; a single chunk's product is rounded once.
        self.whole = hidden_NH.shape[0] <= head.chunk_rows
        self.dtype = head.weight_VH.dtype
        self.trained: Tensor | None = None
        self.bias: Tensor | None = None

    def add(
        self,
        rows: slice,
        input_RH: Tensor,
        odds_RV: Tensor,
        target_R: Tensor,
        stats_4R: Tensor,
        scale_R: Tensor,
    ) -> None:
        """Add rows whose gradient is ``scale * (odds / total - onehot(target)) @ ...``."""
        if self.hidden is not None:
            sum_RH = multiply(odds_RV, self.head.weight_VH)
            hidden_RH, out_RH = self.hidden_NH[rows], self.hidden[rows]
            _finish(self.head, sum_RH, target_R, stats_4R, hidden_RH, out_RH)
            _scale_rows(self.head, out_RH, scale_R)
        # With the target's entry filled in, a row of odds is the whole gradient up to a row scale.
        target_odds_R1 = -(stats_4R[1] * _cap_slope(self.head, stats_4R))[:, None]
        odds_RV.scatter_(1, target_R[:, None], target_odds_R1.to(odds_RV.dtype))
        scale_R = scale_R / stats_4R[1]
        out_dtype = self.dtype if self.whole else torch.float32
        if self.needs_trained:
            factor_RK = input_RH[:, input_RH.shape[1] - self.columns :]
            factor_RK = _scaled_rows(self.head, factor_RK, scale_R)
            self.trained = add_transposed(odds_RV, factor_RK, self.trained, out_dtype)
        if self.needs_bias:
            self.bias = add_transposed(odds_RV, scale_R[:, None], self.bias, torch.float32)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in the order and the dtypes of the inputs."""
        vocabulary = self.head.weight_VH.shape[0]
        trained, bias = self.trained, self.bias
        if self.needs_trained and trained is None:  # no row
            trained = self.hidden_NH.new_zeros(vocabulary, self.columns)
        if self.needs_bias and bias is None:
            bias = self.hidden_NH.new_zeros(vocabulary, 1)
        return (
            self.hidden,
            None if trained is None else trained.to(self.dtype),
            None if bias is None else bias[:, 0].to(self.dtype),
        )


def _finish(
    head: Head,
    sum_RH: Tensor,
    target_R: Tensor,
    stats_4R: Tensor,
    hidden_RH: Tensor,
    out_RH: Tensor,
) -> None:
    """Write the direction ``sum / total - cap_slope * weight[target]``, back through the norm.

    ``out_RH`` may be ``hidden_RH``. The sum is overwritten.
    """
    direct_RH = out_RH if head.norm is None else sum_RH
    if head.fused:
        from rlsloth.kernels.linear_logprob import triton_gradient

        triton_gradient.finish(sum_RH, head.weight_VH, target_R, stats_4R, head.ceiling, direct_RH)
    else:
        target_RH = head.weight_VH[target_R].float()
        sum_RH.div_(stats_4R[1, :, None])
        direct_RH.copy_(sum_RH.sub_(target_RH.mul_(_cap_slope(head, stats_4R)[:, None])))
    if head.norm is not None:
        out_RH.copy_(head.norm.backward(sum_RH, hidden_RH))


def _scale_rows(head: Head, tensor_RH: Tensor, scale_R: Tensor) -> None:
    if head.fused:
        from rlsloth.kernels.linear_logprob import triton_gradient

        triton_gradient.scale_rows(tensor_RH, scale_R)
    else:
        tensor_RH.mul_(scale_R[:, None])


def _scaled_rows(head: Head, tensor_RK: Tensor, scale_R: Tensor) -> Tensor:
    if head.fused:
        scaled_RK = tensor_RK.clone(memory_format=torch.contiguous_format)
        _scale_rows(head, scaled_RK, scale_R)
        return scaled_RK
    return tensor_RK * scale_R[:, None]


def _scale(head: Head, tensor: Tensor, factor: Tensor) -> None:
    """Multiply a tensor in place by a number, rounded once."""
    if head.fused:
        from rlsloth.kernels.linear_logprob import triton_gradient

        triton_gradient.scale(tensor, factor)
        increment_version(tensor)
    else:
        # A vector of one entry: a scalar would be rounded to the gradient's 16 bits first.
        tensor.mul_(factor.reshape(1))


def _cap_slope(head: Head, stats_4R: Tensor) -> Tensor:
    """Return the softcap's slope at the target's logit, [R]; ones without a softcap."""
    if head.ceiling is None:
        return torch.ones_like(stats_4R[3])
    return 1 - (stats_4R[3] / head.ceiling).square()


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
