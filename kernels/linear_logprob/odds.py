# ruff: noqa: N815 -- fields carry shape suffixes too
"""The chunk loop of linear_logprob: each token's odds, and four statistics of each row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlsloth.kernels.linear_logprob.norm import FinalNorm
from rlsloth.kernels.linear_logprob.products import project

FLOOR = -3.0e38  # finite: exp gives 0, and 0 * FLOOR is 0, while 0 * -inf is NaN


@dataclass(frozen=True, slots=True)
class Head:
    """A linear head, and how its products become logits."""

    weight_VH: Tensor
    bias_V: Tensor | None
    slope: float
    """logit_scale / temperature."""
    ceiling: float | None
    """softcap / temperature."""
    norm: FinalNorm | None
    """The final norm that the hidden states still need; None if they are normed."""
    chunk_rows: int

    @property
    def fused(self) -> bool:
        """Whether chunks use the fused Triton product; the others use torch.

        It takes bfloat16 on a GPU, in rows of a multiple of 16 bytes (for the copy engine).
        """
        # TRITON_INTERPRET is Triton's own switch: kernels then run on CPU tensors.
        runs = self.weight_VH.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
        takes = self.weight_VH.dtype == torch.bfloat16 and self.weight_VH.shape[1] % 8 == 0
        return runs and takes and aligned(self.weight_VH)


def aligned(matrix: Tensor) -> bool:
    """Whether the copy engine takes a matrix: dense rows that begin at multiples of 16 bytes."""
    strides_fit = matrix.stride(1) == 1 and matrix.stride(0) * matrix.element_size() % 16 == 0
    return strides_fit and matrix.data_ptr() % 16 == 0


def empty_stats(hidden_NH: Tensor) -> Tensor:
    """Allocate the statistics, [4, N] float32.

    The first three are over the tokens other than the target, with z the scaled and capped logits
    and p their softmax: a reference exponent, ``total = sum(exp(z - reference))`` and ``mean =
    sum(p * (z - reference))``. The fourth is the target's own z.
    """
    count = hidden_NH.shape[0]
    # Rows of whole 64 bytes: Triton compiles a kernel again for pointers of another alignment.
    rows = torch.empty(4, -(-count // 16) * 16, dtype=torch.float32, device=hidden_NH.device)
    return rows[:, :count]


def chunks(
    head: Head, hidden_NH: Tensor, target_N: Tensor, stats_4N: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Fill ``stats_4N`` chunk by chunk; yield each chunk's rows, head input [R, H] and odds [R, V].

    Odds are ``exp(z - reference)``, 0 at the target, times the softcap's slope at z. The next chunk
    overwrites them.
    """
    count, vocabulary = target_N.shape[0], head.weight_VH.shape[0]
    size = min(head.chunk_rows, count)
    if head.fused:
        # Rows of 128 bytes, whatever the vocabulary: the copy engine's stride, aligned for cuBLAS.
        scratch_RV = hidden_NH.new_empty(size, -(-vocabulary // 64) * 64)
    else:
        scratch_RV = hidden_NH.new_empty(2, size, vocabulary, dtype=torch.float32)
    for start in range(0, count, head.chunk_rows):
        rows = slice(start, min(start + head.chunk_rows, count))
        input_RH = hidden_NH[rows] if head.norm is None else head.norm.forward(hidden_NH[rows])
        arguments = target_N[rows], stats_4N[:, rows], head.slope, head.ceiling
        if head.fused:
            from rlsloth.kernels.linear_logprob import triton

            odds_RV = scratch_RV[: rows.stop - start, :vocabulary]
            target_R, stats_4R, slope, ceiling = arguments
            triton.odds(
                input_RH, head.weight_VH, head.bias_V, target_R, odds_RV, stats_4R, slope, ceiling
            )  # fmt: skip
        else:
            logits_RV, odds_RV = scratch_RV[:, : rows.stop - start]
            project(input_RH, head.weight_VH, out_RV=logits_RV)
            if head.bias_V is not None:
                logits_RV.add_(head.bias_V)
            odds_torch(logits_RV, odds_RV, *arguments)
        yield rows, input_RH, odds_RV


def odds_torch(
    logits_RV: Tensor,
    odds_RV: Tensor,
    target_R: Tensor,
    stats_4R: Tensor,
    slope: float,
    ceiling: float | None,
) -> None:
    """Turn raw float32 logits into odds in place, and write their statistics.

    The reference is the largest logit. The code makes few, large, in-place passes: each is a
    barrier between threads, and new memory costs more time than the arithmetic. Not torch.softmax:
    on a CPU its running sum is off by 1e-5 at V = 150,000.
    """
    z, target_R1 = logits_RV, target_R[:, None]
    if slope != 1.0:
        z.mul_(slope)
    cap_slope_RV = None
    if ceiling is not None:
        z.div_(ceiling).tanh_()
        cap_slope_RV = z.square().neg_().add_(1)
        z.mul_(ceiling)
    z_target_R1 = z.gather(1, target_R1)
    z.scatter_(1, target_R1, FLOOR)
    top_R1 = z.amax(1, keepdim=True)
    torch.exp(z.sub_(top_R1), out=odds_RV)
    total_R = odds_RV.sum(1)
    stats_4R[0] = top_R1[:, 0]
    stats_4R[1] = total_R
    stats_4R[2] = z.mul_(odds_RV).sum(1) / total_R
    stats_4R[3] = z_target_R1[:, 0]
    odds_RV.scatter_(1, target_R1, 0.0)
    if cap_slope_RV is not None:
        odds_RV.mul_(cap_slope_RV)


def outputs(stats_4N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the target's log-probability, the entropy and the logsumexp, each [N]."""
    reference_N, total_N, mean_N, target_N = stats_4N
    log_total_N = total_N.log()
    logprob_N = -torch.nn.functional.softplus((reference_N - target_N) + log_total_N)
    # Entropy of "target or not" plus that of the other tokens: no term is negative, none cancel.
    others_N = -torch.expm1(logprob_N)
    entropy_N = (
        -logprob_N.exp() * logprob_N
        + torch.special.entr(others_N)
        + others_N * (log_total_N - mean_N)
    )
    return logprob_N, entropy_N, torch.logaddexp(reference_N + log_total_N, target_N)


def coefficient(logprob_N: Tensor, head: Head) -> Tensor:
    """Return the factor that turns ``odds / total - onehot(target)`` into dlogp/dlogits."""
    return torch.expm1(logprob_N) * head.slope
