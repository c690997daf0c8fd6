"""Rewards that only hang or only fail are given up, with a line that says so."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from helpers.groups import make_group
from rlsloth.config import RewardConfig
from rlsloth.errors import UserError
from rlsloth.scoring.patience import MAX_HANGS, MAX_ROUNDS, FailedRounds
from rlsloth.scoring.scorer import Scorer

pytestmark = pytest.mark.slow

REWARD = """
import time

def hangs(completions, **_): time.sleep(1e9)

def slow_together(completions, **_):
    if len(completions) > 1: time.sleep(1e9)
    return [1.0]

def fails(completions, **_): raise KeyError("no judge")
"""


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    (tmp_path / "r.py").write_text(REWARD)
    return str(tmp_path / "r.py")


def test_a_reward_that_always_hangs_is_given_up(rewards: str) -> None:
    cfg = RewardConfig(workers=2, wall_seconds=0.3)
    start = time.monotonic()
    with Scorer([f"{rewards}:hangs"], cfg) as scorer:
        groups = [make_group(*"abcdefgh") for _ in range(8)]
        with pytest.raises(UserError, match=r"'hangs'.*--reward\.wall-seconds 0\.3.*server"):
            scorer.score(groups)
    assert time.monotonic() - start < 60  # not 8 groups of 8 completions with a restart each


@pytest.mark.slow
def test_a_reward_that_is_only_slow_with_many_completions_goes_on(rewards: str) -> None:
    cfg = RewardConfig(workers=2, wall_seconds=0.3)
    with Scorer([f"{rewards}:slow_together"], cfg) as scorer:
        for _ in range(MAX_HANGS):
            group = make_group("a", "b")
            scorer.score([group])
            assert [r.reward for r in group.rollouts] == [1.0, 1.0]


def test_a_reward_that_always_raises_ends_the_run(rewards: str) -> None:
    failed = FailedRounds()
    with Scorer([f"{rewards}:fails"], RewardConfig(workers=1)) as scorer:
        for _ in range(MAX_ROUNDS - 1):
            failed.check(scorer.score([make_group("a", "b")]))
        with pytest.raises(UserError, match=r"'fails'.*KeyError.*no judge.*--rewards"):
            failed.check(scorer.score([make_group("a", "b")]))
