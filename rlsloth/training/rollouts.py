"""The rollouts of each step, sampled before its update or during the previous one."""

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
    """Samples the groups of each step.

    With ``rollout.overlap`` they are sampled during the previous step's update, from the policy
    before it; only the first step waits for its groups.
    """

    def __init__(
        self,
        cfg: GrpoConfig,
        collector: Collector,
        prompts: EpochSampler[Prompt],
        policy: Policy,
        run: Run,
        stack: ExitStack,
    ) -> None:
        """Prepare sampling.

        Args:
            cfg: the run's configuration.
            collector: samples groups.
            prompts: the training prompts.
            policy: the policy, for its device.
            run: for times.
            stack: ends the thread that samples in the background.
        """
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
        """Return the unscored groups of this step; waiting counts as ``rollout`` time."""
        with self._run.timed("rollout"), advise("rollout", self._policy.model):
            groups, self._next = self._next or self._sample(step), None
        return groups

    @contextmanager
    def during_update(self, step: int) -> Iterator[None]:
        """Sample the next step's rollouts while the body runs, or release the engine's memory."""
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
            job.exception()  # wait for the engine, also if the update has failed
        with advise("rollout", self._policy.model):
            self._next = job.result()

    def cursor(self) -> SamplerState:
        """Return the position in the prompts from which a resumed run continues."""
        return self._before if self._next is not None else self._prompts.state()

    def _sample(self, step: int) -> list[Group]:
        self._before = self._prompts.state()
        prompts = self._prompts.take(self._cfg.prompts_per_step)
        sampling = self._collector.sampling("rollout", step)
        return self._collector.collect(prompts, self._cfg.group_size, sampling, step=step)

    def _event(self) -> Any:
        """Record an event after the copy of the adapter, for which sampling must wait."""
        on_gpu = self._policy.device.type == "cuda"
        return torch.cuda.current_stream().record_event() if on_gpu else None

    def _sample_on_a_stream(self, step: int, event: Any) -> list[Group]:
        if event is None:
            return self._sample(step)
        device = self._policy.device
        # Decoding waits for each of its small kernels, which should not queue behind the update's.
        stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            groups = self._sample(step)
            stream.synchronize()
        return groups
