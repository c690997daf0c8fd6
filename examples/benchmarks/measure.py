"""A meter for benchmarks: seconds by phase, tokens, memory, and time since the process began."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

REST = "update and rest"
PHASES = ("rollout", "hand-over", "reward", REST)
"""Phases of a step. hand-over: the trained adapter is passed to the engine, by whichever caller."""
SAMPLED_EVERY_S = 0.05
GIB = 2**30
PACKAGES = ("rlsloth", "unsloth", "unsloth_zoo", "trl", "vllm", "torch", "transformers", "peft")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # FlashInfer compiles for minutes at its first request: off for every trainer. Unsloth switches
    # FlashInfer's sampler on again, unless its own variable is set.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "UNSLOTH_VLLM_NO_FLASHINFER": "1",
}


def set_environment() -> None:
    """Set ENVIRONMENT before a trainer is imported; variables that are set already stay."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def need(*packages: str) -> None:
    """Exit with one line if a package is not installed. Nothing is imported."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})")


def need_gpu(who: str) -> None:
    """Exit with one line if torch sees no CUDA GPU."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"{who} needs a CUDA GPU, and this torch sees none")


def since_start() -> float:
    """Seconds since this process began, the interpreter's start included."""
    import psutil

    return time.time() - float(psutil.Process().create_time())


def machine() -> dict[str, str]:
    """Name of the device, and versions of the packages."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    versions = {name: _version(name) for name in PACKAGES}
    return {"device": device} | {name: found for name, found in versions.items() if found}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


class Meter:
    """Seconds, tokens and memory of the steps and phases of a training run.

    A step lasts from the end of the step before to its own end, so that no time is lost. A phase
    within a phase does not count for the outer one; time outside any phase counts as REST. The
    device is synchronised whenever a step or phase begins or ends.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        """A row a step: ``seconds``, each of PHASES, ``prompt_tokens``, ``tokens`` (sampled),
        ``allocated_gib`` (torch's peak) and ``device_gib`` (peak use of the whole device, other
        processes included), ``reserved_gib`` (torch's segments at that moment). The first step
        warms up; its device_gib is the use at its end."""
        self.first_step_done_s = 0.0
        """Seconds from the start of the process to the end of the first step."""
        self._phases = [REST]
        self._ended = threading.Event()
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self._mark = _now()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._tokens = self._prompt_tokens = 0
        self._used = self._reserved = self._held = 0
        _forget_peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within the block as one of PHASES."""
        self._settle()
        self._phases.append(name)
        try:
            yield
        finally:
            self._settle()
            self._phases.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the time of its calls counted as a phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def count(self, prompt_tokens: int, tokens: int) -> None:
        """Count prompt tokens, a prompt once for each of its completions, and sampled tokens."""
        self._prompt_tokens += prompt_tokens
        self._tokens += tokens

    def step_done(self) -> None:
        """End the step and begin the next one."""
        self._settle()
        self._sample()
        row = {phase: self._seconds[phase] for phase in PHASES}
        row |= {"seconds": sum(row.values()), "tokens": self._tokens}
        row |= {"prompt_tokens": self._prompt_tokens, "allocated_gib": _allocated() / GIB}
        # Of the moment with the most of the device's memory; torch's gaps are the difference.
        row |= {"device_gib": self._used / GIB, "reserved_gib": self._reserved / GIB}
        row |= {"held_gib": self._held / GIB}
        self.steps.append(row)
        print(f"step {len(self.steps)} measured: {json.dumps(self.steps[-1])}", flush=True)
        if len(self.steps) == 1:
            self.first_step_done_s = since_start()
            # Not earlier: the first step may capture CUDA graphs, and meanwhile no other thread
            # may call the driver.
            threading.Thread(target=self._watch, daemon=True).start()
        self.begin()

    def _settle(self) -> None:
        now = _now()
        self._seconds[self._phases[-1]] += now - self._mark
        self._mark = now

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLED_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        if (used := _in_use()) > self._used:
            self._used, self._reserved, self._held = used, _reserved(), _held()

    def close(self) -> None:
        """Stop the thread that watches memory."""
        self._ended.set()


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _reserved() -> int:
    import torch

    return torch.cuda.memory_reserved()


def _held() -> int:
    import torch

    return torch.cuda.memory_allocated()


def _in_use() -> int:
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def _allocated() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _forget_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
