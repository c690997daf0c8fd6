"""The moment when a step's rollouts are sampled: before its update, or during the one before."""

from __future__ import annotations

import threading
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlsloth.config import GrpoConfig
from rlsloth.data.sampler import EpochSampler
from rlsloth.errors import UserError
from rlsloth.records import Prompt
from rlsloth.training.grpo import _check_version
from rlsloth.training.rollouts import Rollouts


class Parts:
    """A collector that notes what happens; its groups are (step, version, prompts, thread)."""

    def __init__(self, overlap: bool, steps: int = 4) -> None:
        self.cfg = GrpoConfig.model_validate(
            {
                "steps": steps,
                "prompts_per_step": 2,
                "rollout": {"engine": "vllm", "overlap": overlap},
                "loss": {"correction": "token_truncate"},
            }
        )
        self.version = 0
        self.released: list[int] = []
        self.prompts = EpochSampler([Prompt(i, str(i), {}) for i in range(7)], seed=3)
        self.engine = SimpleNamespace(release=lambda: self.released.append(self.version))
        self.run = SimpleNamespace(timed=lambda phase: nullcontext())
        self.policy = SimpleNamespace(model=None, device=torch.device("cpu"))
        self.fails = False

    def sampling(self, *use: int | str) -> tuple[int | str, ...]:
        return use

    def collect(self, prompts: Any, n: int, sampling: Any, *, step: int) -> list[Any]:
        if self.fails:
            raise UserError("the engine broke")
        thread = threading.current_thread() is threading.main_thread()
        return [(step, self.version, [p.index for p in prompts], thread)]


def rollouts_of(parts: Any, stack: ExitStack) -> Rollouts:
    return Rollouts(parts.cfg, parts, parts.prompts, parts.policy, parts.run, stack)


def steps(parts: Parts, *, first: int = 1) -> list[Any]:
    seen = []
    with ExitStack() as stack:
        rollouts = rollouts_of(parts, stack)
        for step in range(first, parts.cfg.steps + 1):
            seen += rollouts.take(step)
            with rollouts.during_update(step):
                pass
            parts.version += 1
    return seen


def test_in_turn_every_step_samples_from_the_newest_policy_and_gives_memory_back():
    parts = Parts(overlap=False)
    seen = steps(parts)
    assert [(step, version) for step, version, *_ in seen] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert all(in_main for *_, in_main in seen)
    assert parts.released == [0, 1, 2, 3]


def test_overlapped_steps_are_one_update_old_and_the_prompts_the_same():
    parts = Parts(overlap=True)
    seen = steps(parts)
    assert [(step, version) for step, version, *_ in seen] == [(1, 0), (2, 0), (3, 1), (4, 2)]
    assert [in_main for *_, in_main in seen] == [True, False, False, False]
    assert [prompts for _, _, prompts, _ in seen] == [
        prompts for _, _, prompts, _ in steps(Parts(overlap=False))
    ]
    assert parts.released == [3]  # nothing is sampled during the last update


def test_a_resumed_run_samples_again_what_was_ahead():
    parts, resumed = Parts(overlap=True), Parts(overlap=True)
    with ExitStack() as stack:
        rollouts = rollouts_of(parts, stack)
        rollouts.take(1)
        with rollouts.during_update(1):
            pass
        state = rollouts.cursor()
        (ahead,) = rollouts.take(2)
        assert rollouts.cursor() == parts.prompts.state() != state
    resumed.prompts.restore(state)
    assert steps(resumed, first=2)[0][2] == ahead[2]  # type: ignore[index]


def test_a_failed_update_interrupts_the_engine_and_waits_for_the_engine_to_rest():
    parts, resting, told = Parts(overlap=True), threading.Event(), threading.Event()
    parts.engine.interrupt = told.set

    def slow(*args: Any, **named: Any) -> list[Any]:
        assert told.wait(30)
        threading.Event().wait(0.2)
        resting.set()
        raise RuntimeError("sampling was interrupted")

    parts.collect = slow
    with ExitStack() as stack:
        rollouts = rollouts_of(parts, stack)
        with pytest.raises(ValueError, match="update"), rollouts.during_update(1):
            raise ValueError("the update broke")
        assert resting.is_set()


def test_a_failure_in_the_background_is_the_runs():
    parts = Parts(overlap=True)
    with ExitStack() as stack:
        rollouts = rollouts_of(parts, stack)
        parts.fails = True
        with pytest.raises(UserError, match="the engine broke"), rollouts.during_update(1):
            pass


@pytest.mark.parametrize(("overlap", "updates", "oldest"), [(True, 3, 2), (False, 3, 5)])
def test_an_update_takes_overlapped_tokens_of_one_step_before(overlap, updates, oldest):
    cfg = Parts(overlap).cfg.model_copy(update={"updates_per_rollout": updates})

    def check(version: int) -> None:
        micro = SimpleNamespace(policy_version=torch.tensor([version, 5]))
        _check_version(SimpleNamespace(microbatches=[micro]), 5, cfg)  # type: ignore[arg-type]

    check(oldest)
    for stale in (oldest - 1, 6):
        with pytest.raises(RuntimeError, match=rf"version \[{stale}\], but version 5"):
            check(stale)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"rollout": {"overlap": True}}, "pass loss.correction token_truncate"),
    ],
)
def test_overlap_needs_a_correction(section, says):
    with pytest.raises(ValueError, match=says):
        GrpoConfig.model_validate(section)
