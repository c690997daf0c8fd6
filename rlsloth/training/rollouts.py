"""A run's rollouts, step by step: sampled before each update, or while the one before runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from rlsloth.config import GrpoConfig
from rlsloth.data.sampler import EpochSampler, SamplerState
from rlsloth.memory.out_of_memory import advise
from rlsloth.policy.policy import Policy
from rlsloth.records import Group, Prompt
from rlsloth.rollout.collector import Collector
from rlsloth.run.run import Run


class Rollouts:
    """The groups of each step. With ``rollout.overlap`` only a run's first step waits for them:
    every other trains on rollouts of the policy one update older."""

    def __init__(
        self,
        cfg: GrpoConfig,
        collector: Collector,
        prompts: EpochSampler[Prompt],
        policy: Policy,
        run: Run,
        stack: ExitStack,
    ) -> None:
        """Args: stack: closes the thread that samples in the background."""
        self._cfg = cfg
        self._collector = collector
        self._prompts = prompts
        self._policy = policy
        self._run = run
        self._next: list[Group] | None = None
        self._before = prompts.state()
        self._pool: ThreadPoolExecutor | None = None
        if cfg.rollout.overlap:
            self._pool = stack.enter_context(ThreadPoolExecutor(1, "rollouts"))

    def take(self, step: int) -> list[Group]:
        """Return the groups of this step, unscored; the time counts as ``rollout``."""
        with self._run.timed("rollout"), advise("rollout", self._policy.model):
            groups, self._next = self._next or self._sample(step), None
        return groups

    @contextmanager
    def during_update(self, step: int) -> Iterator[None]:
        """Run the update of ``step`` inside: while the next rollouts are sampled, or with the
        engine's memory released."""
        engine = self._collector.engine
        if self._pool is None or step == self._cfg.steps:
            engine.release()
            yield
            return
        job = self._pool.submit(self._sample_on_a_stream, step + 1, self._event())
        try:
            yield
        except BaseException:
            engine.interrupt()
            raise
        finally:
            job.exception()  # whatever happens to the update, the engine must have come to rest
        with advise("rollout", self._policy.model):
            self._next = job.result()

    def cursor(self) -> SamplerState:
        """Return the position in the prompts from which a resumed run's next ``take`` goes on."""
        return self._before if self._next is not None else self._prompts.state()

    def _sample(self, step: int) -> list[Group]:
        self._before = self._prompts.state()
        prompts = self._prompts.take(self._cfg.prompts_per_step)
        sampling = self._collector.sampling("rollout", step)
        return self._collector.collect(prompts, self._cfg.group_size, sampling, step=step)

    def _event(self) -> Any:
        """Mark the work on the update's stream that sampling waits for: the adapter's hand-over."""
        on_gpu = self._policy.device.type == "cuda"
        return torch.cuda.current_stream().record_event() if on_gpu else None

    def _sample_on_a_stream(self, step: int, event: Any) -> list[Group]:
        if event is None:
            return self._sample(step)
        device = self._policy.device
        # Decoding waits for each of its small kernels; the update's need not be on time.
        stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            groups = self._sample(step)
            stream.synchronize()
        return groups
