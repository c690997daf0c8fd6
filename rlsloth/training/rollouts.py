"""A run's rollouts, step by step: sampled before each update, or beside the one before."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from rlsloth.data.sampler import SamplerState
from rlsloth.memory.out_of_memory import advise
from rlsloth.records import Group
from rlsloth.training.assembly import Assembly


class Rollouts:
    """One-step-off-policy where ``rollout.overlap`` says so: then only a run's first step waits for
    its rollouts, and every other trains on those of the policy one update older."""

    def __init__(self, parts: Assembly, stack: ExitStack) -> None:
        """``stack`` closes what samples in the background."""
        self._parts = parts
        self._ahead: list[Group] | None = None
        self._before = parts.prompts.state()
        self._pool: ThreadPoolExecutor | None = None
        if parts.cfg.rollout.overlap:
            self._pool = stack.enter_context(ThreadPoolExecutor(1, "rollouts"))

    def take(self, step: int) -> list[Group]:
        """The groups of this step, unscored; time is counted as ``rollout``."""
        with self._parts.run.timed("rollout"), advise("rollout", self._parts.policy.model):
            groups, self._ahead = self._ahead or self._sample(step), None
        return groups

    @contextmanager
    def beside_update(self, step: int) -> Iterator[None]:
        """The update of ``step`` goes on inside, beside the next rollouts or with their memory."""
        cfg = self._parts.cfg
        if self._pool is None or step == cfg.steps:
            self._parts.engine.release()
            yield
            return
        job = self._pool.submit(self._sample_on_a_stream, step + 1, self._event())
        try:
            yield
        except BaseException:
            self._parts.engine.interrupt()
            raise
        finally:
            job.exception()  # whatever happens to the update, the engine must have come to rest
        with advise("rollout", self._parts.policy.model):
            self._ahead = job.result()

    def prompts(self) -> SamplerState:
        """Where the prompts stand for the next ``take``, from which a checkpoint goes on."""
        return self._before if self._ahead is not None else self._parts.prompts.state()

    def _sample(self, step: int) -> list[Group]:
        parts = self._parts
        self._before = parts.prompts.state()
        prompts = parts.prompts.take(parts.cfg.prompts_per_step)
        sampling = parts.sampling("rollout", step)
        return parts.collect(prompts, parts.cfg.group_size, sampling, step=step)

    def _event(self) -> Any:
        """Until which the update's stream has work that sampling needs: the adapter."""
        on_gpu = self._parts.policy.device.type == "cuda"
        return torch.cuda.current_stream().record_event() if on_gpu else None

    def _sample_on_a_stream(self, step: int, event: Any) -> list[Group]:
        if event is None:
            return self._sample(step)
        device = self._parts.policy.device
        # Decoding waits for each of its small kernels; the update's need not be on time.
        stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            groups = self._sample(step)
            stream.synchronize()
        return groups
