# ruff: noqa: N815 -- fields carry shape suffixes too
"""Log-probabilities of selected tokens from hidden states, without a tensor of full logits.

With a frozen head the gradient is ``g_n * dlogp_n/dh_n`` for any upstream ``g``. Its direction is
made in the forward, while a chunk's logits are at hand, and the backward is a row scale: two matrix
products in all. The target stands outside the normaliser: with ``p`` the softmax over the *other*
tokens and ``gap = logsumexp(others) - z_target``,

    logp = -softplus(gap)        dlogp/dz = (1 - exp(logp)) * (onehot(target) - p)

which loses no digit when the policy is certain; only the bracket is ever rounded to 16 bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsloth.kernels.linear_logprob.products import accumulate, multiply, project

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_ROWS = 256  # from here on the products run at the speed of whole ones
CPU_SCRATCH_BYTES = 256 << 20
GPU_SCRATCH_BYTES = 512 << 20
FLOOR = -3.0e38  # finite: exp gives 0, and 0 * FLOOR is 0 where 0 * -inf is NaN


class LinearLogprob(NamedTuple):
    """What the head says of N tokens, each [N] float32, in nats."""

    logprob_N: Tensor
    """Log-probability of the target, differentiable."""
    entropy_N: Tensor
    """Entropy of the distribution, detached."""
    logsumexp_N: Tensor
    """The normaliser's logarithm, detached."""


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> LinearLogprob:
    """Log-probability of ``target_N`` under a linear head, its entropy and logsumexp.

    ``logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature``,
    the tanh only where a softcap is given. Logits and statistics are float32 whatever the inputs
    are. One chunk of ``chunk_rows`` rows of them is held at a time (default:
    ``default_chunk_rows``). The same inputs give bitwise the same log-probs with and without
    gradient.

    With a frozen head the backward scales the saved direction in place: a graph can be
    differentiated once.

    Args:
        hidden_NH: float32, bfloat16 or float16; N may be 0.
        weight_VH: like hidden_NH. Where it or the bias requires grad, the backward recomputes the
            logits and sums their gradients in float32.
        target_N: int64 in [0, V).
        bias_V: like hidden_NH.

    Raises:
        TypeError: a wrong or mismatched dtype.
        ValueError: a wrong shape, device or setting, or a target outside the vocabulary. On a GPU
            such a target fails as a device-side assertion instead: no call waits for the device.
    """
    _check(hidden_NH, weight_VH, target_N, bias_V, temperature, softcap, logit_scale, chunk_rows)
    head = _Head(
        weight_VH.detach(),
        None if bias_V is None else bias_V.detach(),
        slope=logit_scale / temperature,
        ceiling=None if softcap is None else softcap / temperature,
        chunk_rows=chunk_rows or default_chunk_rows(weight_VH.shape[0], weight_VH.device),
    )
    trainable = weight_VH.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if not torch.is_grad_enabled() or not (trainable or hidden_NH.requires_grad):
        stats_4N = _empty_stats(hidden_NH)
        for _ in _chunks(head, hidden_NH.detach(), target_N, stats_4N, write=False):
            pass
        outputs = _outputs(stats_4N)
    elif trainable:
        outputs = _TrainableHead.apply(  # type: ignore[no-untyped-call]
            hidden_NH, weight_VH, bias_V, target_N, head
        )
    else:
        outputs = _FrozenHead.apply(  # type: ignore[no-untyped-call]
            hidden_NH, target_N, head
        )
    return LinearLogprob(*outputs)


def default_chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows per chunk, from nothing that changes between calls: log-probs would change with it."""
    if device.type == "cpu":
        return max(1, min(CPU_ROWS, CPU_SCRATCH_BYTES // (8 * vocabulary)))
    rows = GPU_SCRATCH_BYTES // (4 * vocabulary)
    return min(4096, max(128, rows // 128 * 128))


@dataclass(frozen=True, slots=True)
class _Head:
    weight_VH: Tensor
    bias_V: Tensor | None
    slope: float
    """logit_scale / temperature."""
    ceiling: float | None
    """softcap / temperature."""
    chunk_rows: int


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, target_N: Tensor, head: _Head) -> tuple[Tensor, ...]:
        stats_4N = _empty_stats(hidden_NH)
        direction_NH = torch.empty_like(hidden_NH, memory_format=torch.contiguous_format)
        for rows, direction_RV in _chunks(head, hidden_NH, target_N, stats_4N, write=True):
            multiply(direction_RV, head.weight_VH, out_RH=direction_NH[rows])
        outputs = _outputs(stats_4N)
        ctx.save_for_backward(direction_NH, _coefficient(outputs[0], head))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        direction_NH, coefficient_N = ctx.saved_tensors
        # In place: at long context a second [N, H] would be the largest tensor here. A second
        # backward through the same graph trips autograd's version check.
        return direction_NH.mul_((grad_N * coefficient_N)[:, None]), None, None


class _TrainableHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        head: _Head,
    ) -> tuple[Tensor, ...]:
        stats_4N = _empty_stats(hidden_NH)
        for _ in _chunks(head, hidden_NH, target_N, stats_4N, write=False):
            pass
        outputs = _outputs(stats_4N)
        # Saved though head holds them too: autograd then notices a weight changed in between.
        ctx.save_for_backward(
            hidden_NH, weight_VH, bias_V, target_N, _coefficient(outputs[0], head)
        )
        ctx.head = head
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, target_N, coefficient_N = ctx.saved_tensors
        scale_N1 = (grad_N * coefficient_N)[:, None]
        grad_hidden = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        grad_weight = _zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        grad_bias = _zeros_like(bias_V[:, None]) if ctx.needs_input_grad[2] else None
        stats_4N = _empty_stats(hidden_NH)
        for rows, direction_RV in _chunks(ctx.head, hidden_NH, target_N, stats_4N, write=True):
            if grad_hidden is not None:
                multiply(direction_RV, weight_VH, out_RH=grad_hidden[rows])
                grad_hidden[rows].mul_(scale_N1[rows])
            if grad_weight is not None:
                accumulate(direction_RV, hidden_NH[rows] * scale_N1[rows], grad_weight)
            if grad_bias is not None:
                accumulate(direction_RV, scale_N1[rows], grad_bias)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VH.dtype),
            None if grad_bias is None else grad_bias[:, 0].to(bias_V.dtype),
            None,
            None,
        )


def _chunks(
    head: _Head, hidden_NH: Tensor, target_N: Tensor, stats_4N: Tensor, write: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Fill ``stats_4N`` chunk by chunk; yield each chunk's rows and, with ``write``, its direction.

    The direction lies in the scratch: it is gone once the next chunk is asked for, and without
    ``write`` means nothing.
    """
    count, vocabulary = target_N.shape[0], head.weight_VH.shape[0]
    scratch_RV = torch.empty(
        min(head.chunk_rows, count), vocabulary, dtype=torch.float32, device=hidden_NH.device
    )
    # TRITON_INTERPRET is Triton's own switch: kernels then run on CPU tensors.
    by_triton = hidden_NH.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    spare_RV = scratch_RV if by_triton else torch.empty_like(scratch_RV)
    for start in range(0, count, head.chunk_rows):
        rows = slice(start, min(start + head.chunk_rows, count))
        logits_RV = scratch_RV[: rows.stop - rows.start]
        project(hidden_NH[rows], head.weight_VH, out_RV=logits_RV)
        if head.bias_V is not None:
            logits_RV.add_(head.bias_V)
        args = target_N[rows], stats_4N[:, rows], head.slope, head.ceiling
        if by_triton:
            from rlsloth.kernels.linear_logprob import triton

            direction_RV = triton.row_pass(logits_RV, *args, hidden_NH.dtype if write else None)
        else:
            direction_RV = row_pass_torch(logits_RV, spare_RV[: len(logits_RV)], *args, write)
        yield rows, direction_RV


def row_pass_torch(
    logits_RV: Tensor,
    spare_RV: Tensor,
    target_R: Tensor,
    stats_4R: Tensor,
    slope: float,
    ceiling: float | None,
    write: bool,
) -> Tensor:
    """Row statistics of raw float32 logits and, with ``write``, their direction, in ``spare_RV``.

    With z the scaled and capped logits and p the softmax over the tokens other than the target,
    ``stats_4R`` receives, over those other tokens, ``top = max(z)``, ``total = sum(exp(z - top))``
    and ``mean = sum(p * (z - top))``, then the target's own z. The direction is
    ``(p - onehot(target)) * (1 - (z / ceiling)**2)``, that is ``-dlogp/dlogits / slope / (1 -
    exp(logp))``.

    Few, large, in-place passes: each is a barrier between threads, and memory taken anew is slower
    than the arithmetic. Not torch.softmax: on a CPU its running sum is off by 1e-5 at V = 150,000.
    """
    z, target_R1 = logits_RV, target_R[:, None]
    if slope != 1.0:
        z.mul_(slope)
    cap_slope_RV = None
    if ceiling is not None:
        z.div_(ceiling).tanh_()
        cap_slope_RV = 1 - z.square() if write else None
        z.mul_(ceiling)
    z_target_R1 = z.gather(1, target_R1)
    z.scatter_(1, target_R1, FLOOR)
    top_R1 = z.amax(1, keepdim=True)
    e = torch.exp(z.sub_(top_R1), out=spare_RV)
    total_R = e.sum(1)
    stats_4R[0] = top_R1[:, 0]
    stats_4R[1] = total_R
    stats_4R[2] = z.mul_(e).sum(1) / total_R
    stats_4R[3] = z_target_R1[:, 0]
    if write:
        e.div_(total_R[:, None]).scatter_(1, target_R1, -1.0)
        if cap_slope_RV is not None:
            e.mul_(cap_slope_RV)
    return e


def _outputs(stats_4N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top_N, total_N, mean_N, target_N = stats_4N
    log_total_N = total_N.log()
    logprob_N = -torch.nn.functional.softplus((top_N - target_N) + log_total_N)
    # Entropy of "target or not", plus that among the others: no term is negative, nothing cancels.
    others_N = -torch.expm1(logprob_N)
    entropy_N = (
        -logprob_N.exp() * logprob_N
        + torch.special.entr(others_N)
        + others_N * (log_total_N - mean_N)
    )
    return logprob_N, entropy_N, torch.logaddexp(top_N + log_total_N, target_N)


def _coefficient(logprob_N: Tensor, head: _Head) -> Tensor:
    """What turns a row's direction into dlogp/dlogits."""
    return torch.expm1(logprob_N) * head.slope


def _empty_stats(hidden_NH: Tensor) -> Tensor:
    return torch.empty(4, hidden_NH.shape[0], dtype=torch.float32, device=hidden_NH.device)


def _zeros_like(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32)


def _check(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
) -> None:
    named = {"hidden_NH": hidden_NH, "weight_VH": weight_VH, "target_N": target_N}
    shapes = [2, 2, 1]
    if bias_V is not None:
        named["bias_V"] = bias_V
        shapes.append(1)
    for (name, tensor), dimensions in zip(named.items(), shapes, strict=True):
        if tensor.dim() != dimensions:
            raise ValueError(f"{name} has {tensor.dim()} dimensions, expected {dimensions}")
        if tensor.device != hidden_NH.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_NH on {hidden_NH.device}")
        if name == "target_N" and tensor.dtype != torch.int64:
            raise TypeError(f"target_N is {tensor.dtype}, expected torch.int64")
        if name != "target_N" and (tensor.dtype not in DTYPES or tensor.dtype != hidden_NH.dtype):
            raise TypeError(
                f"{name} is {tensor.dtype}, hidden_NH {hidden_NH.dtype}: "
                "both must be float32, bfloat16 or float16, and the same"
            )
    (count, width), vocabulary = hidden_NH.shape, weight_VH.shape[0]
    if weight_VH.shape[1] != width:
        raise ValueError(f"weight_VH has hidden size {weight_VH.shape[1]}, hidden_NH {width}")
    if target_N.shape[0] != count:
        raise ValueError(f"target_N has {target_N.shape[0]} rows, hidden_NH {count}")
    if bias_V is not None and bias_V.shape[0] != vocabulary:
        raise ValueError(f"bias_V has {bias_V.shape[0]} entries, weight_VH {vocabulary} rows")
    for setting, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not 0.0 < value < float("inf"):
            raise ValueError(f"{setting} is {value}, expected a positive number")
    if not 0.0 < abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale is {logit_scale}, expected a finite number other than 0")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected 1 or more")
    inside = ((target_N >= 0) & (target_N < vocabulary)).all()
    message = f"target_N holds a token outside the vocabulary of {vocabulary}"
    if target_N.is_cuda:
        torch._assert_async(inside, message)
    elif not inside:
        raise ValueError(message)
