"""Time, memory and error of linear_logprob with a frozen head, on whatever device is there.

python -m rlsloth.kernels.linear_logprob.bench --tokens 8192 --hidden 4096 --vocab 128256
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rlsloth.kernels.linear_logprob.op import linear_logprob
from rlsloth.kernels.linear_logprob.reference import linear_logprob_reference

GEMM_ROWS = {"cuda": 4096, "cpu": 256}  # the bare products run in chunks too, at their best
CHECKED_ROWS = 64


def main() -> None:
    """Print one table."""
    cuda = torch.cuda.is_available()
    args = _arguments(cuda)
    device = torch.device("cuda" if cuda else "cpu")
    dtype: torch.dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    hidden_NH = torch.randn(args.tokens, args.hidden, device=device).to(dtype)
    # Logits of standard deviation 4 reach about +-20, as a trained model's do.
    weight_VH = (torch.randn(args.vocab, args.hidden, device=device) * 4 / args.hidden**0.5).to(
        dtype
    )
    target_N = torch.randint(0, args.vocab, (args.tokens,), device=device)
    gradient_N = torch.randn(args.tokens, device=device)

    def evaluate() -> Tensor:
        return linear_logprob(
            hidden_NH,
            weight_VH,
            target_N,
            temperature=args.temperature,
            softcap=args.softcap,
            chunk_rows=args.chunk_rows,
        ).logprob_N

    def train() -> None:
        hidden_NH.requires_grad_()
        torch.autograd.grad(evaluate(), hidden_NH, gradient_N)
        hidden_NH.requires_grad_(False)

    floor = measure(_two_products(hidden_NH, weight_VH), device, args.repeat)
    forward = measure(evaluate, device, args.repeat)
    both = measure(train, device, args.repeat)
    peak = peak_bytes(train, device)
    rows = slice(0, CHECKED_ROWS)
    expected_N, _, _ = linear_logprob_reference(
        hidden_NH[rows].double(),
        weight_VH.double(),
        target_N[rows],
        temperature=args.temperature,
        softcap=args.softcap,
    )
    error = (evaluate()[rows] - expected_N).abs().max().item()

    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    gradient = hidden_NH.nbytes / 2**20
    print(f"{name}  torch {torch.__version__}  {args.dtype}")
    print(f"tokens {args.tokens}  hidden {args.hidden}  vocabulary {args.vocab}")
    print(f"two bare GEMMs                {1e3 * floor:10.2f} ms")
    print(f"forward, no gradient          {1e3 * forward:10.2f} ms")
    print(f"forward + backward            {1e3 * both:10.2f} ms  ({floor / both:.0%} of the GEMMs)")
    print(f"peak memory above inputs      {peak / 2**20:10.1f} MiB (gradient: {gradient:.1f})")
    print(f"largest error of a log-prob   {error:10.1e} (of {CHECKED_ROWS}, against float64)")


def _arguments(cuda: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 800)
    parser.add_argument("--hidden", type=int, default=4096 if cuda else 576)
    parser.add_argument("--vocab", type=int, default=128256 if cuda else 49152)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16" if cuda else "float32",
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--chunk-rows", type=int)
    parser.add_argument("--repeat", type=int, default=10 if cuda else 5)
    return parser.parse_args()


def measure(run: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Median seconds of a call, after one that warms up."""
    seconds = []
    for _ in range(repeat + 1):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call holds at once beyond what was allocated before it."""
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _two_products(hidden_NH: Tensor, weight_VH: Tensor) -> Callable[[], None]:
    count, size = hidden_NH.shape[0], GEMM_ROWS[hidden_NH.device.type]
    chunks = [hidden_NH[i : i + size] for i in range(0, count, size)]
    logits_RV = hidden_NH.new_empty(chunks[0].shape[0], weight_VH.shape[0])
    product_RH = torch.empty_like(chunks[0])

    def run() -> None:
        for rows_RH in chunks:
            rows = slice(0, rows_RH.shape[0])
            torch.mm(rows_RH, weight_VH.t(), out=logits_RV[rows])
            torch.mm(logits_RV[rows], weight_VH, out=product_RH[rows])

    return run


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
