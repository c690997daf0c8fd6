"""``rlsloth doctor``: check this machine for what training needs, with a remedy for each fault."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pydantic import Field

from rlsloth.cli.package_checks import Check, package_checks
from rlsloth.cli.read_config import read_config
from rlsloth.config import Section

GIB = 1024**3
NETWORK_SECONDS = 3.0


def run_doctor(as_json: bool = False, model: str | None = None) -> int:
    """Print the report. Returns 0 when training can run here, 1 otherwise.

    Raises:
        UserError: the model's configuration cannot be read.
    """
    of_model = model_checks(model) if model is not None else []
    checks = [*package_checks(), *gpu_checks(), *host_checks(), *hub_checks(), *of_model]
    ready = not any(check.status == "error" for check in checks)
    if as_json:
        print(json.dumps({"ready": ready, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        _print_table(checks, ready)
    return 0 if ready else 1


# --- GPU -----------------------------------------------------------------------------------------


def gpu_checks() -> list[Check]:
    """Checks of the GPUs that torch sees, and of the attention backends that work here."""
    try:
        import torch
    except ImportError as error:
        return [Check("gpu", "torch", f"cannot be imported: {error}", "error", "reinstall torch")]
    driver = _driver()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    checks = [Check("gpu", "torch build", f"{torch.__version__} ({build})", "ok")]
    if not torch.cuda.is_available():
        checks.append(_why_no_gpu(driver, torch.version.cuda))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        major, minor = properties.major, properties.minor
        first = {"bf16": (8, 0), "FP8": (8, 9)}
        able = [name for name, capability in first.items() if (major, minor) >= capability]
        found = (
            f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
            f"compute capability {major}.{minor}, {' and '.join(able) or 'no bf16'}, "
            f"driver {driver or 'unknown'}"
        )
        note = "" if able else "bf16 needs compute capability 8.0: runs take fp16"
        checks.append(Check("gpu", f"cuda:{index}", found, "note" if note else "ok", note))
    try:
        from rlsloth.policy.attention.backends import available_backends
    except ImportError as error:
        advice = "fix the packages above"
        return [*checks, Check("gpu", "attention", f"cannot be imported: {error}", "error", advice)]
    return [*checks, Check("gpu", "attention", ", ".join(available_backends()), "ok")]


def _why_no_gpu(driver: str | None, cuda_build: str | None) -> Check:
    if driver is None:
        return Check("gpu", "GPU", "none", "note", "a CPU is enough for about 100M parameters")
    if cuda_build is None:
        advice = "there is a driver, but torch is a CPU build: install a CUDA build of torch"
        return Check("gpu", "GPU", f"driver {driver}, unused", "note", advice)
    advice = f"torch needs CUDA {cuda_build}: update the driver, and check CUDA_VISIBLE_DEVICES"
    return Check("gpu", "GPU", f"driver {driver}, but torch sees no GPU", "note", advice)


def _driver() -> str | None:
    """Version of the NVIDIA driver; None if nvidia-smi is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.split("\n")[0].strip() or None


# --- host and hub --------------------------------------------------------------------------------


def host_checks() -> list[Check]:
    """Checks of CPU, memory and disk."""
    cpu_flags = _fields("/proc/cpuinfo").get("flags", "").split()
    fast = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in cpu_flags]
    bf16 = any("bf16" in name for name in fast)
    affinity = hasattr(os, "sched_getaffinity")  # Linux: the cores that this process may use
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count()
    note = "bf16 is fast here" if bf16 else "no bf16 units: fp32 is faster on this CPU"
    found = f"{cores} cores, {', '.join(fast) or 'no AVX-512'}"
    checks = [Check("host", "CPU", found, "ok", note)]
    memory = _fields("/proc/meminfo")
    if memory:
        free, total = (int(memory[k].split()[0]) / 2**20 for k in ("MemAvailable", "MemTotal"))
        checks.append(Check("host", "memory", f"{free:.1f} of {total:.1f} GiB free", "ok"))
    folder = Path("runs").resolve()
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder).free / GIB
    found = f"{disk:.1f} GiB free at runs/"
    if not os.access(folder, os.W_OK):
        advice = f"{folder} is read-only: pass --run.dir"
    else:
        advice = "checkpoints may not fit: free some space, or pass --run.dir" if disk < 5 else ""
    return [*checks, Check("host", "disk", found, "note" if advice else "ok", advice)]


def _fields(path: str) -> dict[str, str]:
    """The ``name : value`` lines of a file in /proc; empty if there is no such file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def hub_checks() -> list[Check]:
    """Check whether models and datasets can be downloaded."""
    offline = "pass local files: --model.path FOLDER_OR_GGUF --env.train FILE"
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            return [Check("hub", "hub", f"off: {variable} is set", "note", offline)]
    try:
        from huggingface_hub import constants
    except ImportError:
        return [Check("hub", "hub", "no huggingface_hub", "note", "pip install transformers")]
    if _within(NETWORK_SECONDS, lambda: _answers(constants.ENDPOINT)):
        return [Check("hub", "hub", f"{constants.ENDPOINT} answers", "ok")]
    return [Check("hub", "hub", f"{constants.ENDPOINT} does not answer", "note", offline)]


def _answers(url: str) -> bool:
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=NETWORK_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _within(seconds: float, check: Callable[[], bool]) -> bool:
    """Result of ``check``; False after ``seconds``, since name look-ups have no time-out."""
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(check()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results == [True]


def model_checks(path: str) -> list[Check]:
    """Checks of a model: modules that run on rlsloth's kernels, and modules that do not."""
    from rlsloth.policy.folder_check import WEIGHTS, weight_files
    from rlsloth.policy.wrap.preview import preview

    name, report = preview(path)
    found = f"{report.wrapped_layers} of {report.layers} layers on rlsloth's kernels"
    advice = "" if report.kernels else "trains correctly on transformers' own modules, slower"
    checks = [Check("model", name, found, "note" if advice else "ok", advice)]
    folder = Path(path).expanduser()
    if folder.is_dir() and not weight_files(folder):
        checks.append(Check("model", "weights", "none", "note", f"copy {WEIGHTS} to {folder}"))
    for kernel, count in report.kernels.items():
        checks.append(Check("model", kernel, f"{count} modules", "ok"))
    for left in report.left:
        found = f"{left.count} modules on transformers' own code"
        checks.append(Check("model", left.name, found, "note", left.reason))
    return checks


def _print_table(checks: list[Check], ready: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {
        "ok": Text("ok", "green"),
        "note": Text("-", "yellow"),
        "error": Text("FIX", "bold red"),
    }
    table = Table(show_edge=False, header_style="bold")
    for heading in ("", "check", "found", "remedy or use"):
        table.add_column(heading, overflow="fold")
    group = checks[0].group
    for check in checks:
        if check.group != group:
            table.add_section()
            group = check.group
        # Text, not markup: advice such as rlsloth[vllm] has brackets.
        table.add_row(marks[check.status], check.name, Text(check.found), Text(check.advice))
    console = Console()
    console.print(table)
    verdict = (
        "Training can run here." if ready else "Training cannot run yet: fix the rows marked FIX."
    )
    console.print(verdict, style="bold green" if ready else "bold red")


class DoctorOptions(Section):
    """Options of ``rlsloth doctor``."""

    as_json: bool = Field(False, alias="json")
    """Print JSON instead of a table."""
    model: str | None = None
    """Hub id, folder or GGUF file of a model: also report which of its modules run on rlsloth's
    kernels. Only its configuration is read."""


ABOUT = "Check versions, GPU, memory and disk. Exit status 1 when training cannot run here."


def run(name: str, argv: list[str]) -> int:
    """Print the report. Returns the exit status: 1 when training cannot run here."""
    chosen = read_config(DoctorOptions, argv, f"rlsloth {name}", ABOUT)
    return run_doctor(chosen.as_json, chosen.model)
