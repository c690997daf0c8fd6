"""Changes to vLLM's behaviour, each with its reason and the versions that need it.

tests/rollout/test_compat_vllm.py has a test for each change that fails once vLLM no longer needs
it, and checks the installed version. Changes to other libraries are in policy/compat.py.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from rlsloth.policy.compat import Change

VERSIONS = ">=0.26,<0.33"

# --- FlashInfer: not imported --------------------------------------------------------------------

FLASHINFER_IMPORTED = Change(
    "vllm",
    VERSIONS,
    "to list the attention backends that could be used it imports FlashInfer, which takes 4 s, "
    "also on GPUs where it then chooses FlashAttention or where FlashInfer cannot compile",
)


@contextmanager
def without_flashinfer(device: torch.device, kv_cache: str) -> Iterator[None]:
    """Hide FlashInfer from vLLM where it would not use it."""
    hidden = False
    if device.type == "cuda" and "flashinfer" not in sys.modules:
        from vllm.utils.flashinfer import has_flashinfer

        major = torch.cuda.get_device_capability()[0]
        hidden = major == 9 or (major == 8 and kv_cache == "auto") or not has_flashinfer()
    if not hidden:
        yield
        return
    sys.modules["flashinfer"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["flashinfer"]


# --- models: inspected in this process -----------------------------------------------------------

INSPECTED_IN_A_PROCESS = Change(
    "vllm",
    VERSIONS,
    "it imports a model's class in another process to learn what the class supports, which takes "
    "24 s; a class that is registered after its import is inspected in place",
)


def register_imported(family: str) -> None:
    """Register vLLM's own class of a model family again, as a class that is imported already."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(family, ModelRegistry.models[family].load_model_cls())


# --- threads and seeds: as before the start ------------------------------------------------------

THREADS_AND_SEEDS_CHANGED = Change(
    "vllm",
    VERSIONS,
    "its worker seeds every random generator of the process, and on a CPU it replaces "
    "torch.set_num_threads by a function that only warns",
)


@contextmanager
def state_restored() -> Iterator[None]:
    """Restore random generators of the CPU, torch's threads and warning filters afterwards.

    Changes by vLLM's import stay: environment variables, its own warning filters, and on a GPU
    that torch's attention no longer chooses cuDNN by itself.
    """
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


# --- CUDA graphs: a new pool for each engine -----------------------------------------------------

GRAPH_POOL_KEPT = Change(
    "vllm",
    VERSIONS,
    "it keeps the pool of its CUDA graphs as long as the process runs; torch refuses new graphs in "
    "a pool whose graphs are gone, so that a second engine would fail",
)


def forget_graph_pool() -> None:
    """Make vLLM's next engine take a new pool for its CUDA graphs."""
    from vllm.platforms import current_platform

    type(current_platform)._global_graph_pool = None


# --- sampling on the caller's stream -------------------------------------------------------------

STREAM_KEPT = Change(
    "vllm",
    VERSIONS,
    "its model runner keeps the CUDA stream that was current at its first step, but overlapped "
    "rollouts sample on a stream of their own and evaluations on the default one",
)


def forget_stream(model_runner: Any) -> None:
    """Make a model runner look up the current CUDA stream again."""
    model_runner.__dict__.pop("main_stream", None)


# --- the worker (applied by rollout.vllm.worker.SharedWorker) ------------------------------------

WEIGHTS_SLEEP = Change(
    "vllm",
    VERSIONS,
    "its sleep copies the weights to the CPU and back (12 s for an 8B model), but here they belong "
    "to the trainer; only the key-value cache is to be freed",
)

LARGEST_BATCH_RUN = Change(
    "vllm",
    VERSIONS,
    "it runs the largest batch at the start to measure memory, also where the size of the "
    "key-value cache is set",
)

SAMPLERS_WARMED_UP = Change(
    "vllm",
    VERSIONS,
    "before it captures CUDA graphs it compiles the kernels of every way to sample, of which a run "
    "uses one",
)

PROGRESS_SHOWN = Change(
    "vllm",
    VERSIONS,
    "one of its two model runners shows a bar while it captures CUDA graphs, whatever "
    "use_tqdm_on_load says",
)


@contextmanager
def without_progress() -> Iterator[None]:
    """Show no bar while CUDA graphs are captured."""
    from vllm.v1.worker.gpu import cudagraph_utils

    shown = cudagraph_utils.tqdm
    cudagraph_utils.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        cudagraph_utils.tqdm = shown


CHANGES = (
    FLASHINFER_IMPORTED,
    INSPECTED_IN_A_PROCESS,
    THREADS_AND_SEEDS_CHANGED,
    GRAPH_POOL_KEPT,
    STREAM_KEPT,
    WEIGHTS_SLEEP,
    LARGEST_BATCH_RUN,
    SAMPLERS_WARMED_UP,
    PROGRESS_SHOWN,
)
"""All changes in this file."""
