"""Timing of kernels against a floor and against peers, in one process and interleaved."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
SLEEP_CYCLES = 6_000_000  # 3 to 4 ms


@dataclass(frozen=True)
class Case:
    """One row of the table: an operation at one shape."""

    op: str
    """Name of the folder under kernels/."""
    shape: str
    """The shape for display: ``T 8192 H 4096 V 128256``."""
    ours: Run
    floor: Run
    """The lower bound: the bare matrix products, or a copy of the bytes that must move."""
    floor_name: str
    peers: dict[str, Callable[[], Run]] = field(default_factory=dict)
    """Functions that prepare a peer's run, by name; ImportError means that it is not installed."""
    error: Callable[[], float] | None = None
    """Our largest error against float64, absolute or relative (the op's bench defines which)."""


@dataclass(frozen=True)
class Result:
    """A measured case: median time in milliseconds, memory in MiB above that of the inputs."""

    op: str
    shape: str
    name: str
    """``ours``, ``floor: <its name>`` or a peer's name."""
    time: float
    share: float
    """The floor's time divided by this time."""
    memory: float
    error: float | None


def measure(case: Case, device: torch.device, peers: bool, seconds: float = 1.0) -> list[Result]:
    """Time floor, ours and the peers in turn for several rounds, each right after a call of itself.

    A peer that is not installed, or that fails at this shape, is printed with the reason.
    """
    runs: dict[str, Run] = {f"floor: {case.floor_name}": case.floor, "ours": case.ours}
    for name, prepare in case.peers.items() if peers else ():
        try:
            runs[name] = prepare()
            runs[name]()
        except Exception as reason:
            runs.pop(name, None)
            print(f"{case.op} {case.shape}: no {name}: {repr(reason)[:200]}")
    memory = {name: peak_bytes(run, device) / 2**20 for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    slowest = max(seconds_of(run, device) for run in runs.values())
    rounds = min(50, max(5, int(seconds / slowest)))
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(run, device))
    middle = {name: 1e3 * statistics.median(all_) for name, all_ in times.items()}
    floor = next(iter(middle.values()))
    error = case.error() if case.error is not None else None
    return [
        Result(
            case.op,
            case.shape,
            name,
            middle[name],
            floor / middle[name],
            memory[name],
            error if name == "ours" else None,
        )
        for name in runs
    ]


def seconds_of(run: Run, device: torch.device) -> float:
    """Time one call in seconds, by the device's own clock if it has one."""
    if device.type == "cuda":
        # The host runs ahead, as in training, so launch overhead is not counted as kernel time. The
        # call before keeps the chip as warm as this run makes it: its clock falls under matrix
        # products and rises during runs that wait for memory.
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
        run()
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def peak_bytes(run: Run, device: torch.device) -> int:
    """Return the peak bytes of a second call, beyond what was allocated before it.

    The first call compiles and fills caches.
    """
    run()
    if device.type != "cuda":
        return _peak_bytes_cpu(run)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_bytes_cpu(run: Run) -> int:
    gc.collect()  # older garbage freed during the run would make the count negative
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


def copy_of(count: int, device: torch.device) -> Run:
    """Make a copy that reads and writes ``count`` bytes in total: the floor of memory-bound ops."""
    source = torch.empty(max(count // 2, 1), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def normal(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Return random numbers instead of zeros, which a chip multiplies faster."""
    return (torch.randn(*shape, device=device) * scale).to(dtype)


Cases = Callable[[torch.device], Iterator[Case]]
"""The function ``cases`` of each ``kernels/<op>/bench.py``, which yields the rows of its table."""
