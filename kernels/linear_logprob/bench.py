"""Bench cases of linear_logprob: frozen head, trained head, and peers on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from rlsloth.kernels.linear_logprob.norm import FinalNorm
from rlsloth.kernels.linear_logprob.op import linear_logprob, weighted_logprob_sum
from rlsloth.kernels.linear_logprob.peers import peers
from rlsloth.kernels.linear_logprob.products import add_transposed
from rlsloth.kernels.linear_logprob.reference import linear_logprob_reference
from rlsloth.kernels.measure import Case, Run, seconds_of
from rlsloth.kernels.rms_norm.op import rms_norm

SHAPES = {
    "cuda": ((8192, 4096, 128256), (16384, 2048, 151936), (32768, 4096, 128256)),
    "cpu": ((300, 64, 5003),),
}
TRAINED = {"cuda": ((8192, 4096, 128256),), "cpu": ((300, 64, 5003),)}
FLOOR_ROWS = (1024, 4096)  # the bare products run in chunks too, of the faster of these sizes
TOPS = (0.01, 0.5, 0.99)
LARGEST = 30.0
CHECKED_ROWS = 192


def cases(device: torch.device) -> Iterator[Case]:
    """Yield forward + backward cases at the shapes at which peers were measured.

    The error is that of a log-prob, in nats, over rows whose likeliest token has probability 0.01,
    0.5 or 0.99 at a logit of 30; the target is that token and another one in turn.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape in SHAPES[device.type]:
        yield _case(device, dtype, *shape, trained=False, known=False)
    for shape in TRAINED[device.type]:
        for trained, known in ((True, False), (True, True), (False, True)):
            yield _case(device, dtype, *shape, trained=trained, known=known)
    yield _norm_case(device, dtype, *SHAPES[device.type][0])


def _case(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    width: int,
    vocabulary: int,
    *,
    trained: bool,
    known: bool,
) -> Case:
    torch.manual_seed(0)
    hidden_NH, weight_VH, target_N = peaked(tokens, width, vocabulary, device, dtype)
    gradient_N = torch.randn(tokens, device=device)
    if known and not trained:
        gradient_N[tokens // 2 :] = 0.0
    work_NH = hidden_NH.clone().requires_grad_()
    weight_VH.requires_grad_(trained)
    leaves = [work_NH, weight_VH] if trained else [work_NH]

    def ours() -> None:
        with torch.no_grad():
            work_NH.copy_(hidden_NH)
        out = linear_logprob(work_NH, weight_VH, target_N, overwrite_hidden=not trained)
        torch.autograd.grad(out.logprob_N, leaves, gradient_N)

    def ours_known() -> None:
        total, _ = weighted_logprob_sum(work_NH, weight_VH, target_N, gradient_N)
        torch.autograd.grad(total, leaves)

    def error() -> float:
        rows = slice(0, CHECKED_ROWS)
        expected_N, _, _ = linear_logprob_reference(
            hidden_NH[rows].double(), weight_VH.detach().double(), target_N[rows]
        )
        with torch.no_grad():
            actual_N = linear_logprob(hidden_NH, weight_VH, target_N).logprob_N[rows]
        return float((actual_N - expected_N).abs().max())

    name = "trained head" if trained else "frozen head"
    if known:
        name += ", known weights" if trained else ", known weights, half of them 0"
    products = {(False, False): 2, (False, True): 1.5, (True, True): 3, (True, False): 4}
    return Case(
        "linear_logprob",
        f"{name}, T {tokens} H {width} V {vocabulary}",
        ours_known if known else ours,
        _products(hidden_NH, weight_VH.detach(), trained, known),
        f"{products[trained, known]:g} matrix products",
        {} if trained or known else peers(hidden_NH, weight_VH, target_N, gradient_N),
        error,
    )


def _norm_case(
    device: torch.device, dtype: torch.dtype, tokens: int, width: int, vocabulary: int
) -> Case:
    """Make the case of the final norm inside the op, compared with the norm applied before it."""
    torch.manual_seed(0)
    hidden_NH, weight_VH, target_N = peaked(tokens, width, vocabulary, device, dtype)
    gradient_N = torch.randn(tokens, device=device)
    norm = FinalNorm(torch.ones(width, device=device, dtype=dtype), 1e-6)
    work_NH = hidden_NH.clone().requires_grad_()

    def run(inside: bool) -> None:
        with torch.no_grad():
            work_NH.copy_(hidden_NH)
        input_NH = work_NH if inside else rms_norm(work_NH, norm.weight_H, norm.eps)
        out = linear_logprob(
            input_NH, weight_VH, target_N, norm=norm if inside else None, overwrite_hidden=True
        )
        torch.autograd.grad(out.logprob_N, work_NH, gradient_N)

    return Case(
        "linear_logprob",
        f"final norm and frozen head, T {tokens} H {width} V {vocabulary}",
        partial(run, True),
        _products(hidden_NH, weight_VH, trained=False, known=False),
        "2 matrix products",
        {"ours, the norm in front": lambda: partial(run, False)},
    )


def peaked(
    tokens: int, width: int, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden states, head and targets with known top probabilities.

    Row n's top token has probability ``TOPS[n % 3]`` at a logit of 30; it is the target in every
    other group of three rows.
    """
    weight_VH = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    top_N = torch.randint(0, vocabulary, (tokens,), device=device)
    share_N = torch.tensor(TOPS, device=device)[torch.arange(tokens, device=device) % len(TOPS)]
    # p follows from the other tokens' logsumexp: ln V + s^2 / 2 for normal logits of deviation s.
    others_N = LARGEST - torch.logit(share_N)
    deviation_N = (2 * (others_N - torch.tensor(float(vocabulary)).log())).clamp_min(0.1).sqrt()
    hidden_NH = torch.randn(tokens, width, device=device) * deviation_N[:, None]
    top_NH = weight_VH[top_N].float()
    missing_N = LARGEST - (hidden_NH * top_NH).sum(1)
    hidden_NH += (missing_N / top_NH.square().sum(1))[:, None] * top_NH
    other_N = torch.randint(0, vocabulary, (tokens,), device=device)
    is_top_N = torch.arange(tokens, device=device) // len(TOPS) % 2 == 0
    return hidden_NH.to(dtype), weight_VH, torch.where(is_top_N, top_N, other_N)


def _products(hidden_NH: Tensor, weight_VH: Tensor, trained: bool, known: bool) -> Run:
    """Run the bare products, in chunks of the size that was fastest in a few trials.

    A trained head's gradient is one product over all rows, written once in float32.
    """
    runs = [_chunked(hidden_NH, weight_VH, rows, trained, known) for rows in FLOOR_ROWS]
    device = hidden_NH.device
    times = [[seconds_of(run, device) for _ in range(4)] for run in runs]
    fastest = [min(trials[1:]) for trials in times]  # the first warms up
    return runs[fastest.index(min(fastest))]


def _chunked(hidden_NH: Tensor, weight_VH: Tensor, size: int, trained: bool, known: bool) -> Run:
    chunks = torch.split(hidden_NH, size)
    count, vocabulary = hidden_NH.shape[0], weight_VH.shape[0]
    forwards = 2 if trained and not known else 1
    # With a frozen head, rows of a known weight of 0 (half of them) skip the second product.
    backward_rows = count // 2 if known and not trained else count

    def run() -> None:
        # The head's gradient reads the logits of all rows.
        logits_NV = hidden_NH.new_empty(count if trained else min(size, count), vocabulary)
        product_RH = torch.empty_like(chunks[0])
        for index, rows_RH in enumerate(chunks):
            start = index * size if trained else 0
            logits_RV = logits_NV[start : start + rows_RH.shape[0]]
            for _ in range(forwards):
                torch.mm(rows_RH, weight_VH.t(), out=logits_RV)
            if index * size < backward_rows:
                torch.mm(logits_RV, weight_VH, out=product_RH[: rows_RH.shape[0]])
        if trained:
            add_transposed(logits_NV, hidden_NH, None, torch.float32)

    return run
