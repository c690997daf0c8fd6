"""Markers by file suffix, so that no test file has to name them.

``test_x_gpu.py`` needs a CUDA GPU, ``test_x_vllm.py`` needs vLLM, ``test_x_gguf.py`` needs
llama-cpp-python, and ``test_x_vllm_gpu.py`` needs both of what it names.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Generator
from functools import cache
from pathlib import Path

import pytest

SUFFIXES = ("gpu", "vllm", "gguf")


def markers_of(path: Path) -> list[str]:
    """Markers that a file's name asks for: the last parts of its stem that are suffixes."""
    found: list[str] = []
    for part in reversed(path.stem.split("_")):
        if part not in SUFFIXES:
            break
        found.append(part)
    return found


@cache
def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before -m selects by these markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in markers_of(item.path):
            item.add_marker(marker)
            # Warnings of drivers, vLLM and llama.cpp differ between machines: shown, not errors.
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_collection_finish() -> None:
    """Hide all that is imported from the garbage collector.

    Every run of a loop collects garbage; with the modules of all libraries and tests that takes
    more than a second.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extension modules report leaks as the process ends


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Wait for imports that a refused run has left: pytest then reads the table of loggers."""
    try:
        return (yield)
    finally:
        if preload := sys.modules.get("rlsloth.training.preload"):
            preload.finish_imports()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs a CUDA GPU")
