"""vLLM's GPU worker for weights that belong to the trainer."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from rlsloth.rollout.vllm.compat import forget_stream, without_progress


class SharedWorker(Worker):  # type: ignore[misc]
    """GPU worker whose sleep frees the key-value cache alone and whose start runs no trial batch.

    The reasons are in rollout.vllm.compat: WEIGHTS_SLEEP, LARGEST_BATCH_RUN, SAMPLERS_WARMED_UP,
    PROGRESS_SHOWN.
    """

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        if tag != "kv_cache":
            return nullcontext()
        pool: AbstractContextManager[None] = super()._maybe_get_memory_pool_context(tag)
        return pool

    def determine_available_memory(self) -> int:
        """Return the configured bytes of the key-value cache, without running a batch."""
        if self.model_config.is_moe or self.model_config.use_mla:
            # Kernels of experts and MLA share a workspace, which must have its full size before
            # CUDA graphs point to it.
            with torch.inference_mode(), set_current_vllm_config(self.vllm_config):
                self.model_runner.profile_run()
        size: int = self.cache_config.kv_cache_memory_bytes
        return size

    def execute_model(self, *args: Any, **named: Any) -> Any:
        """Run a step on the caller's current stream."""
        forget_stream(self.model_runner)
        return super().execute_model(*args, **named)

    def compile_or_warm_up_model(self) -> Any:
        """Capture the CUDA graphs; other kernels are compiled at their first use."""
        with without_progress():
            self.model_runner.capture_model()
        gc.collect()
        gc.freeze()  # else each sleep, which collects garbage, would traverse all modules
        return CompilationTimes(language_model=0.0, encoder=0.0)
