# ruff: noqa: N815 -- fields carry shape suffixes too
"""Log-probabilities of selected tokens from hidden states, without a tensor of full logits.

With a frozen head the gradient is ``g_n * dlogp_n/dh_n`` for any upstream ``g``. The forward makes
its direction while it has a chunk's odds, and the backward is a row scale: two matrix products in
total. The target is left out of the normaliser: with ``p`` the softmax over the *other* tokens and
``gap = logsumexp(others) - z_target``,

    logp = -softplus(gap)        dlogp/dz = (1 - exp(logp)) * (onehot(target) - p)

which loses no digit when the policy is certain; only ``p`` is ever rounded to 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rlsloth.kernels.linear_logprob.autograd import FrozenHead, TrainableHead, WeightedSum
from rlsloth.kernels.linear_logprob.checks import (
    check,
    check_lora,
    check_norm,
    check_row_weight,
)
from rlsloth.kernels.linear_logprob.norm import FinalNorm
from rlsloth.kernels.linear_logprob.odds import Head, aligned, chunks, empty_stats, outputs

CPU_ROWS = 256  # from this size on, the products are as fast as unchunked ones
CPU_SCRATCH_BYTES = 256 << 20
GPU_ROWS = 4096
GPU_SCRATCH_BYTES = 320 << 20  # 1024 rows at V 128256 and 151936: 97 % of one wave at H 4096 (H100)
ROW_TILE = 128


class LinearLogprob(NamedTuple):
    """Statistics of N tokens under the head, each [N] float32, in nats."""

    logprob_N: Tensor
    """Log-probability of the target, differentiable."""
    entropy_N: Tensor
    """Entropy of the distribution, detached."""
    logsumexp_N: Tensor
    """Logarithm of the normaliser, detached."""


@dataclass(frozen=True, slots=True)
class HeadLora:
    """An adapter on the head: logits of ``weight + scale * b @ a``."""

    a_RH: Tensor
    b_VR: Tensor
    scale: float

    def narrow(self, hidden_NH: Tensor) -> Tensor:
        """Return ``scale * hidden @ a.T`` [N, R], b's left factor, in the dtype of hidden_NH."""
        return self.scale * (hidden_NH @ self.a_RH.to(hidden_NH.dtype).t())


def linear_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    lora: HeadLora | None = None,
    norm: FinalNorm | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    overwrite_hidden: bool = False,
) -> LinearLogprob:
    """Return the log-probability of ``target_N`` under a linear head, entropy and logsumexp.

    ``logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature``,
    with the tanh only if a softcap is given. Logits and statistics are float32 for any input dtype,
    also under autocast. Logits exist for one chunk of rows at a time. The same inputs give bitwise
    the same log-probs with and without gradient.

    With a frozen head the backward scales the saved direction in place, so a graph can be
    differentiated only once.

    Args:
        hidden_NH: float32, bfloat16 or float16; N may be 0.
        weight_VH: like hidden_NH. If it, the bias or the adapter requires grad, the backward
            recomputes the logits and sums the gradients in float32.
        target_N: int64 in [0, V).
        bias_V: like hidden_NH.
        lora: an adapter on the head, in any floating dtype; the weight is then frozen, and each
            call copies it into one matrix with the adapter.
        norm: the model's final norm, if hidden_NH is the residual stream before it. It is applied
            chunk by chunk, bitwise like ``rms_norm``; not together with lora.
        chunk_rows: rows held at a time; chosen by the device's memory if None.
        overwrite_hidden: store the gradient's direction in hidden_NH, if the head is frozen.
            Nothing may read hidden_NH afterwards, including the backward of the op that made it.

    Raises:
        TypeError: a wrong or mismatched dtype.
        ValueError: a wrong shape, device or setting, or a target outside the vocabulary. On a GPU
            such a target fails a device-side assertion instead, since no call waits for the device.
    """
    check(hidden_NH, weight_VH, target_N, bias_V, temperature, softcap, logit_scale, chunk_rows)
    transform = _Transform(temperature, softcap, logit_scale)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        inputs = _prepare(hidden_NH, weight_VH, target_N, bias_V, lora, norm, transform, chunk_rows)
        hidden_NH, trained_VK, target_N, head = inputs
        result = _outputs(hidden_NH, trained_VK, bias_V, target_N, head, overwrite_hidden)
    return LinearLogprob(*result)


def weighted_logprob_sum(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    row_weight_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    lora: HeadLora | None = None,
    norm: FinalNorm | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, LinearLogprob]:
    """Return the scalar ``sum(row_weight * logprob)`` and the detached ``linear_logprob`` outputs.

    For losses whose weights are known beforehand (cross-entropy; a policy gradient on-policy): the
    forward makes all gradients, and the backward multiplies them by a number. A trained head then
    costs three products instead of four, and rows of weight 0 cost one instead of two. The call
    waits for the device once, to count the nonzero weights; if some are 0, it holds a copy of
    hidden_NH in addition to the gradient.

    ``row_weight_N`` is float32 [N] without a gradient; the other arguments are those of
    ``linear_logprob``. A graph can be differentiated only once.
    """
    check(hidden_NH, weight_VH, target_N, bias_V, temperature, softcap, logit_scale, chunk_rows)
    check_row_weight(row_weight_N, hidden_NH)
    transform = _Transform(temperature, softcap, logit_scale)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        inputs = _prepare(hidden_NH, weight_VH, target_N, bias_V, lora, norm, transform, chunk_rows)
        hidden_NH, trained_VK, target_N, head = inputs
        total, *result = WeightedSum.apply(  # type: ignore[no-untyped-call]
            hidden_NH, trained_VK, bias_V, target_N, row_weight_N, head, torch.is_grad_enabled()
        )
    return total, LinearLogprob(*result)


def _outputs(
    hidden_NH: Tensor,
    trained_VK: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    head: Head,
    overwrite_hidden: bool,
) -> tuple[Tensor, ...]:
    """Return the statistics, with the backward that the tensors' gradients need."""
    trainable = trained_VK.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if not torch.is_grad_enabled() or not (trainable or hidden_NH.requires_grad):
        stats_4N = empty_stats(hidden_NH)
        for _ in chunks(head, hidden_NH.detach(), target_N, stats_4N):
            pass
        return outputs(stats_4N)
    made: tuple[Tensor, ...]
    if trainable:
        made = TrainableHead.apply(  # type: ignore[no-untyped-call]
            hidden_NH, trained_VK, bias_V, target_N, head
        )
    else:
        made = FrozenHead.apply(  # type: ignore[no-untyped-call]
            hidden_NH, target_N, head, overwrite_hidden
        )
    return made


class _Transform(NamedTuple):
    temperature: float
    softcap: float | None
    logit_scale: float


def _prepare(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    lora: HeadLora | None,
    norm: FinalNorm | None,
    transform: _Transform,
    chunk_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor, Head]:
    """Return hidden states, trainable columns and targets as the kernels take them; the head."""
    if norm is not None:
        check_norm(norm, hidden_NH, lora is not None)
    trained_VK = weight_VH
    if lora is not None:
        check_lora(lora.a_RH, lora.b_VR, weight_VH)
        # (h | s h A^T) @ (W | B)^T: the adapter adds a few columns to the same product.
        hidden_NH = torch.cat([hidden_NH, lora.narrow(hidden_NH)], dim=1)
        trained_VK = lora.b_VR.to(hidden_NH.dtype)
        weight_VH = torch.cat([weight_VH.detach(), trained_VK.detach()], dim=1)
    if bias_V is not None:
        # Made finite if tokens are masked by -inf: 0 * -inf would be NaN in the entropy.
        bias_V = bias_V.detach().clamp_min(max(-1.0e30, torch.finfo(bias_V.dtype).min)).contiguous()
    head = Head(
        weight_VH.detach(),
        bias_V,
        slope=transform.logit_scale / transform.temperature,
        ceiling=None if transform.softcap is None else transform.softcap / transform.temperature,
        norm=norm,
        chunk_rows=chunk_rows or 1,
    )
    if chunk_rows is None:
        trained = trained_VK.shape[1] if trained_VK.requires_grad and torch.is_grad_enabled() else 0
        head = replace(head, chunk_rows=_chunk_rows(hidden_NH.shape[0], head, trained))
    if head.fused and not aligned(hidden_NH):
        hidden_NH = hidden_NH.clone(memory_format=torch.contiguous_format)
    return hidden_NH, trained_VK, target_N.contiguous(), head


def _chunk_rows(count: int, head: Head, trained: int) -> int:
    """Return the rows per chunk: whole tiles, in chunks of about equal size that fit the scratch.

    The gradient of trained columns is summed chunk by chunk, so fused chunks may be as large as
    that sum if they fit in half of the free memory. A fused row's log-prob is the same in any
    chunk.
    """
    vocabulary, device = head.weight_VH.shape[0], head.weight_VH.device
    rows = most_rows(vocabulary, device, head.fused)
    if trained and head.fused and device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        rows = max(rows, min(2 * trained, free // (4 * vocabulary)))
    parts = max(1, -(-count // rows))
    return min(rows, max(1, -(-count // (parts * ROW_TILE)) * ROW_TILE))


def most_rows(vocabulary: int, device: torch.device, fused: bool) -> int:
    """Return the most rows in a chunk of a frozen head."""
    if device.type == "cpu":
        return max(1, min(CPU_ROWS, CPU_SCRATCH_BYTES // (8 * vocabulary)))
    # Without the fused kernel a chunk holds float32 logits and odds, and the odds in 16 bits.
    rows = GPU_SCRATCH_BYTES // ((2 if fused else 10) * vocabulary)
    # A power of two gives whole waves of the product with the head if there are several chunks.
    return min(GPU_ROWS, max(ROW_TILE, 1 << max(rows, 1).bit_length() - 1))
