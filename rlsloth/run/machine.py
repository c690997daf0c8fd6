"""environment.json: versions, device and command line of a run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from rlsloth.files import write_json

_PACKAGES = [
    "rlsloth",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "safetensors",
    "triton",
    "vllm",
    "flash-attn-4",
    "math-verify",
    "reasoning-gym",
    "numpy",
    "pyarrow",
    "pydantic",
]


def write_environment(folder: Path) -> None:
    """Save versions, device and command line; a resumed run adds a file of its own."""
    now = datetime.now().astimezone()
    path = folder / "environment.json"
    if path.exists():
        path = folder / f"environment-{now:%Y%m%d-%H%M%S}.json"
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    environment = {
        "started": now.isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_facts(),
        "versions": versions,
    }
    write_json(path, environment)


def device_facts() -> dict[str, Any]:
    """Name and size of the first GPU, or of the CPU when there is none."""
    import torch  # lazily: the command line and the report need no torch

    if not torch.cuda.is_available():
        return {
            "name": _cpu_name(),
            "kind": "cpu",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "kind": "cuda",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
