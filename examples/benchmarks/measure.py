"""What the comparisons measure: seconds by phase, tokens, memory, and when the process began."""

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
"""hand-over: the trained adapter on its way to the engine, wherever it was called from."""
SAMPLED_EVERY_S = 0.05
GIB = 2**30
PACKAGES = ("rlsloth", "unsloth", "unsloth_zoo", "trl", "vllm", "torch", "transformers", "peft")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # FlashInfer compiles for minutes at its first request: off for every trainer. Unsloth would
    # switch its sampler on again, so it has a variable of its own.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "UNSLOTH_VLLM_NO_FLASHINFER": "1",
}


def set_environment() -> None:
    """Before a trainer is imported. What the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def need(*packages: str) -> None:
    """Exit with one line if any of them is not installed. Nothing is imported."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})")


def need_gpu(who: str) -> None:
    """Exit with one line where torch sees no CUDA GPU."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"{who} needs a CUDA GPU, and this torch sees none")


def since_start() -> float:
    """Seconds since this process began, the interpreter's own start included."""
    import psutil

    return time.time() - float(psutil.Process().create_time())


def machine() -> dict[str, str]:
    """The device's name and the versions that ran."""
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
    """Cuts a training run into steps and phases, and watches memory meanwhile.

    A step lasts from the end of the one before to its own end, so that nothing falls between. A
    phase within a phase is taken out of the outer one; what is in none counts as REST. The device
    is waited for at every border.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        """A row a step: ``seconds``, each of PHASES, ``prompt_tokens``, ``tokens`` (sampled),
        ``allocated_gib`` (torch's peak) and ``device_gib`` (the most in use on the whole device,
        other processes included). The first step warms up; its device_gib is that at its end."""
        self.first_step_done_s = 0.0
        """Since the process began."""
        self._phases = [REST]
        self._ended = threading.Event()
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self._mark = _now()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._tokens = self._prompt_tokens = self._used = 0
        _forget_peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside to one of PHASES."""
        self._settle()
        self._phases.append(name)
        try:
            yield
        finally:
            self._settle()
            self._phases.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is, its calls counted to a phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def count(self, prompt_tokens: int, tokens: int) -> None:
        """Tokens that the engine was given, a prompt counted once for each of its completions, and
        those it sampled."""
        self._prompt_tokens += prompt_tokens
        self._tokens += tokens

    def step_done(self) -> None:
        """The step ends here, and the next begins."""
        self._settle()
        self._sample()
        row = {phase: self._seconds[phase] for phase in PHASES}
        row |= {"seconds": sum(row.values()), "tokens": self._tokens}
        row |= {"prompt_tokens": self._prompt_tokens, "allocated_gib": _allocated() / GIB}
        self.steps.append(row | {"device_gib": self._used / GIB})
        print(f"step {len(self.steps)} measured: {json.dumps(self.steps[-1])}", flush=True)
        if len(self.steps) == 1:
            self.first_step_done_s = since_start()
            # Not earlier: the first step may capture CUDA graphs, which other threads must not
            # disturb by calls to the driver.
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
        self._used = max(self._used, _in_use())

    def close(self) -> None:
        """End the watching."""
        self._ended.set()


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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
