"""Scores of groups by rewards that run in worker processes.

A reward is called with all completions of one prompt, so that it may compare them. If that call
fails, it is called again with one completion at a time, and only the culprit is marked as failed. A
list of the wrong length is a mistake in the reward, and fails the group.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from rlsloth.config import RewardConfig
from rlsloth.errors import UserError, nearest
from rlsloth.plugins import builtin_names, is_passed, passed, passed_name
from rlsloth.records import Group, Prompt, Rollout
from rlsloth.scoring.passed import pickle_reward
from rlsloth.scoring.patience import Hangs
from rlsloth.scoring.process import WorkerProcess, hung
from rlsloth.scoring.protocol import Call, Reply, RewardSetup, Setup
from rlsloth.scoring.report import Outcome, ScoringReport, assign_scores
from rlsloth.scoring.request import accepted_columns, group_call


class Scorer:
    """Runs the configured rewards over groups of rollouts.

    Workers start in the background; the first ``score`` (or ``wait_ready``) waits for them. Use it
    as a context manager, or call ``close``.

    Raises:
        UserError: no rewards, an unknown one, two of one name, or parameters of an unused one.
    """

    def __init__(
        self, rewards: Sequence[str], cfg: RewardConfig, *, reserved_metrics: Sequence[str] = ()
    ) -> None:
        """Start the workers; ``log_metric`` refuses names of ``reserved_metrics``, which are shell
        patterns."""
        self.names = tuple(_name(spec) for spec in rewards)
        _check_names(self.names, cfg)
        self._cfg = cfg
        self._weights = cfg.weights if cfg.weights is not None else [1.0] * len(self.names)
        setup = Setup(
            rewards=[
                _reward_setup(spec, name, cfg)
                for spec, name in zip(rewards, self.names, strict=True)
            ],
            memory_bytes=int(cfg.memory_gb * 2**30),
            reserved_metrics=list(reserved_metrics),
        )
        self._workers = [WorkerProcess(setup, cfg.pass_env) for _ in range(cfg.workers)]
        self._hangs = Hangs(cfg.wall_seconds)
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(cfg.workers, thread_name_prefix="scorer")
        self._submitted: dict[int, tuple[Group, list[Future[Outcome]]]] = {}
        """Jobs by ``id`` of their group; the group is kept so that its id is not reused."""

    def wait_ready(self) -> None:
        """Wait until the workers have imported the rewards; for use before the first ``score``.

        Raises:
            UserError: a reward cannot be found or imported, or has no parameter of a configured
                name.
        """
        for worker in self._workers:
            worker.rewards()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse data that the rewards cannot be called with, before anything is sampled.

        The columns of every prompt are checked, and each reward is called with an empty completion
        of the first one, since many rewards check their columns only when called. Only a UserError
        of that call counts.

        Raises:
            UserError: as ``score``.
        """
        for name, info in zip(self.names, self._workers[0].rewards(), strict=True):
            for prompt in prompts:
                accepted_columns(prompt, name, info)
        for prompt in prompts[:1]:
            for reward in range(len(self.names)):
                self._score(Group(prompt, [], [_empty_rollout()]), reward, 0)

    def takes(self, column: str) -> bool:
        """Whether some reward is called with a column of the data."""
        every = [info["accepts"] for info in self._workers[0].rewards()]
        return any(accepts is None or column in accepts for accepts in every)

    def submit(self, group: Group, *, step: int = 0) -> None:
        """Begin to score a complete group in the background; ``score`` then waits for it."""
        jobs = [self._threads.submit(self._score, group, r, step) for r in range(len(self.names))]
        self._submitted[id(group)] = group, jobs

    def score(self, groups: Sequence[Group], *, step: int = 0) -> ScoringReport:
        """Fill ``scores`` and ``reward`` of every rollout. ``step`` is trainer_state.global_step.

        Submitted groups are not scored again.

        Raises:
            UserError: a reward cannot be imported, raised UserError itself, hangs in call after
                call, or logged a metric of the trainer's; a column is missing, has the name of an
                argument, or cannot be written as JSON.
        """
        for group in groups:
            if id(group) not in self._submitted:
                self.submit(group, step=step)
        jobs = [self._submitted.pop(id(group))[1] for group in groups]
        outcomes = [[job.result() for job in of_group] for of_group in jobs]
        report = assign_scores(groups, self.names, outcomes)
        for group in groups:
            for rollout in group.rollouts:
                rollout.reward = self._weighted_sum(rollout)
        return report

    def _weighted_sum(self, rollout: Rollout) -> float | None:
        pairs = zip(self._weights, rollout.scores, strict=True)
        terms = [weight * score.value for weight, score in pairs if score.value is not None]
        if not terms or any(score.failure is not None for score in rollout.scores):
            return None
        return sum(terms)

    def _score(self, group: Group, reward: int, step: int) -> Outcome:
        start = time.monotonic()
        worker = self._idle.get()
        try:
            rows = len(group.rollouts)
            call = group_call(group, reward, self.names[reward], worker.rewards()[reward], step)
            replies = [self._ask(worker, call, 0, rows)]
            error = replies[0]["error"]
            if error is not None and error["kind"] != "wrong length" and rows > 1:
                replies += [self._ask(worker, call, row, row + 1) for row in range(rows)]
        finally:
            self._idle.put(worker)
        return Outcome(replies, rows, time.monotonic() - start)

    def _ask(self, worker: WorkerProcess, call: Call, start: int, stop: int) -> Reply:
        part = call.copy()
        part["completions"] = call["completions"][start:stop]
        part["completion_ids"] = call["completion_ids"][start:stop]
        part["finish_reasons"] = call["finish_reasons"][start:stop]
        part["environment_reward"] = call["environment_reward"][start:stop]
        # A group's common call may take as long as two completions: one that hangs then costs
        # little, and a reward too slow for that is called one completion at a time, each with a
        # full budget.
        share = min(stop - start, 2)
        part["cpu_seconds"] = self._cfg.cpu_seconds * share
        name = self.names[call["reward"]]
        self._hangs.check(name)
        reply = worker.call(part, self._cfg.wall_seconds * share)
        # A group's common call may be too slow without any hang: its completions are called again.
        if stop - start == 1 or not hung(reply):
            self._hangs.count(name, hung=hung(reply))
        if reply["user_error"] is not None:
            raise UserError(reply["user_error"])
        return reply

    def close(self) -> None:
        """Kill the workers and all processes that they started."""
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _empty_rollout() -> Rollout:
    message = {"role": "assistant", "content": ""}
    return Rollout([], [], [], [], finish="stop", text="", messages=[message])


def _reward_setup(spec: str, name: str, cfg: RewardConfig) -> RewardSetup:
    pickled = pickle_reward(passed(spec, "reward"), name) if is_passed(spec) else None
    return RewardSetup(spec=spec, name=name, params=dict(cfg.params.get(name, {})), pickled=pickled)


def _name(spec: str) -> str:
    """A reward's name in metrics and configuration, which is that of its function.

    Raises:
        UserError: no such built-in reward or file. Modules are looked up by the workers.
    """
    if is_passed(spec):
        return passed_name(spec)
    place, _, attribute = spec.partition(":")
    if place.endswith(".py"):
        if not attribute:
            raise UserError(f"reward {spec!r}: name the function, as in {place}:reward")
        if not Path(place).expanduser().is_file():
            raise UserError(f"reward {spec!r}: no file {place} in {Path.cwd()}")
    elif not (attribute and "." in place):
        names = builtin_names("rlsloth.rewards")
        if place not in names:
            raise UserError(
                f"unknown reward {spec!r}{nearest(place, names)} "
                f"(built in: {', '.join(names)}; or pkg.module:name, or ./file.py:name)"
            )
    return attribute or place


def _check_names(names: tuple[str, ...], cfg: RewardConfig) -> None:
    if not names:
        raise UserError("no rewards: name at least one, e.g. --rewards math_verify")
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(
                f"{count} of --rewards are called {name!r}: rename one of the functions"
            )
    if cfg.weights is not None and len(cfg.weights) != len(names):
        raise UserError(
            f"reward.weights has {len(cfg.weights)} numbers for {len(names)} rewards: pass one for "
            "each"
        )
    for name in cfg.params:
        if name not in names:
            hint = nearest(name, list(names))
            raise UserError(f"reward.params has {name!r}, which is not among --rewards{hint}")
