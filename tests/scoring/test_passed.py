"""Rewards that are passed from Python and run in worker processes."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import Any

import pytest
import torch

from rlsloth import plugins
from rlsloth.config import RewardConfig
from rlsloth.errors import UserError
from rlsloth.records import Group, Prompt, Rollout
from rlsloth.scoring import passed
from rlsloth.scoring.passed import pickle_reward
from rlsloth.scoring.scorer import Scorer

ONE = RewardConfig(workers=1)


def group(*texts: str, **columns: Any) -> Group:
    rollouts = []
    for text in texts:
        message = {"role": "assistant", "content": text}
        rollouts.append(Rollout([], [], [], [], finish="stop", text=text, messages=[message]))
    return Group(Prompt(0, "Say it.", columns), [], rollouts)


def score(*rewards: Any, texts: tuple[str, ...] = ("ab", "abc"), **columns: Any) -> list[Any]:
    specs = {f"python:r{i}#0": reward for i, reward in enumerate(rewards)}
    with plugins.passing(specs), Scorer(list(specs), ONE) as scorer:
        scorer.wait_ready()
        scored = group(*texts, **columns)
        scorer.score([scored])
    for rollout in scored.rollouts:
        assert all(s.failure is None for s in rollout.scores), rollout.scores
    return [[s.value for s in rollout.scores] for rollout in scored.rollouts]


def cell(source: str, name: str) -> Any:
    """A function of a notebook's cell: no module that another process could import."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(source, names)
    return names[name]


CELL = """
import re
import threading
from dataclasses import dataclass

LETTERS = re.compile("[a-z]")
UNUSED = threading.Lock()

@dataclass
class Count:
    text: str
    def letters(self):
        return len(LETTERS.findall(self.text))

def helper(text):
    return Count(text).letters() if text else helper("")

def letters(completions, **columns):
    return [float(helper(c)) for c in completions]
"""


def test_lambdas_closures_cells_and_coroutines() -> None:
    factor = 10

    async def later(completions: list[Any], answer: list[int]) -> list[float]:
        await asyncio.sleep(0)
        return [float(a) for a in answer]

    values = score(
        lambda completions, **_: [factor * len(text) for text in completions],
        cell(CELL, "letters"),
        later,
        answer=7,
    )
    assert values == [[20, 2, 7], [30, 3, 7]]


def test_a_passed_reward_gets_parameters_and_may_hang() -> None:
    def slow(completions: list[Any], *, target: int = 1, **_: Any) -> list[float]:
        while "loop" in completions[0]:
            pass
        return [float(target)] * len(completions)

    cfg = RewardConfig(workers=1, cpu_seconds=0.2, params={"slow": {"target": 5}})
    with plugins.passing({"python:slow#0": slow}), Scorer(["python:slow#0"], cfg) as scorer:
        first, second = group("loop"), group("a")
        scorer.score([first])
        scorer.score([second])  # by the worker that took the place of the one that was killed
    assert first.rollouts[0].scores[0].failure == "timeout"
    assert second.rollouts[0].scores[0].value == 5


def test_what_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()

    def locked(completions: list[Any]) -> list[float]:
        with lock:
            return [0.0] * len(completions)

    with pytest.raises(UserError) as caught:
        pickle_reward(locked, "locked")
    text = str(caught.value)
    assert all(word in text for word in ("'locked'", "'lock'", "_thread.lock", "./FILE.py:NAME"))
    assert "\n" not in text


def test_tensors_on_a_device_are_refused() -> None:
    weights = torch.ones(2, device="meta")  # stands for a GPU
    mean = torch.ones(2)

    def uses(completions: list[Any]) -> list[float]:
        return [float((weights * mean).sum())] * len(completions)

    with pytest.raises(UserError, match=r"'weights'.*a tensor on meta"):
        pickle_reward(uses, "uses")
    pickle_reward(lambda completions: [float(mean.sum())], "cpu")


def test_large_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passed, "MAX_BYTES", 1 << 20)
    table = b"x" * (2 << 20)
    with pytest.raises(UserError, match=r"'big' carries 2 MiB.*at most 1"):
        pickle_reward(lambda completions: [len(table)], "big")


def test_a_module_that_the_worker_lacks_is_named() -> None:
    class Loads:
        def __reduce__(self) -> Any:
            return __import__, ("no_such_module",)

        def __call__(self, completions: list[Any]) -> list[float]:
            return []

    with pytest.raises(UserError, match=r"'r0'.*no_such_module"):
        score(Loads())


def test_a_reward_that_was_not_passed_is_refused_in_one_line() -> None:
    with pytest.raises(UserError) as caught:
        Scorer(["length", "python:tidy#3f2a9c015b7e"], ONE)
    assert re.search(r"python:tidy#3f2a9c015b7e.*resume=True", str(caught.value))
