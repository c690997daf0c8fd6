"""vLLM's GPU worker, for weights that are the trainer's."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes


class SharedWorker(Worker):  # type: ignore[misc]
    """Of all that vLLM allocates, its sleep frees the key-value cache alone.

    Weights would be copied to the CPU (12 s for an 8B model) and back; they are not vLLM's.
    """

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        if tag != "kv_cache":
            return nullcontext()
        pool: AbstractContextManager[None] = super()._maybe_get_memory_pool_context(tag)
        return pool

    def determine_available_memory(self) -> int:
        """Bytes of the key-value cache: as asked, without a run of the largest batch to see."""
        if self.model_config.is_moe or self.model_config.use_mla:
            # Their kernels share a workspace, which must have its full size before graphs point
            # at it.
            with torch.inference_mode(), set_current_vllm_config(self.vllm_config):
                self.model_runner.profile_run()
        size: int = self.cache_config.kv_cache_memory_bytes
        return size

    def execute_model(self, *args: Any, **named: Any) -> Any:
        """On the stream of the caller, which overlapped rollouts change: vLLM keeps the one that it
        has first seen."""
        self.model_runner.__dict__.pop("main_stream", None)
        return super().execute_model(*args, **named)

    def compile_or_warm_up_model(self) -> Any:
        """Capture the CUDA graphs. Kernels are compiled when first used: vLLM would compile those
        of every way to sample."""
        self.model_runner.capture_model()
        gc.collect()
        gc.freeze()  # or each sleep, which collects garbage, would go through all modules
        return CompilationTimes(language_model=0.0, encoder=0.0)
