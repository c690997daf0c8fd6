"""Failures of rewards: the step goes on, and the culprit alone is marked."""

from __future__ import annotations

import time

import pytest

from helpers.groups import make_group
from rlsloth.config import RewardConfig
from rlsloth.scoring.scorer import Scorer

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("word", "kind", "detail"),
    [
        ("raise", "raised", "ValueError: no digits (hostile.py:"),
        ("exit", "raised", "SystemExit"),
        ("memory", "raised", "MemoryError"),
        ("loop", "timeout", "0.3 s of CPU time"),
        ("swallow", "timeout", "0.3 s of CPU time"),
        ("c loop", "timeout", "0.3 s of CPU time"),
        ("nan", "not finite", "score is nan"),
        ("inf", "not finite", "score is -inf"),
        ("huge", "not finite", "too large"),
        ("text", "wrong type", "str"),
        ("list", "wrong type", "list"),
        ("_exit", "crashed", "exit status 3"),
        ("segfault", "crashed", "SIGSEGV"),
    ],
)
def test_only_the_culprit_fails(hostile: Scorer, word: str, kind: str, detail: str) -> None:
    groups = [make_group("ok", word, index=7), make_group("ok", index=8)]
    report = hostile.score(groups)
    fine, culprit = groups[0].rollouts
    assert (fine.reward, culprit.reward) == (1.0, None)
    assert culprit.scores[0].failure == kind
    assert detail in culprit.scores[0].detail
    assert groups[1].rollouts[0].reward == 1.0
    (reward,) = report.rewards
    assert reward.failures == {kind: 1}
    assert reward.scored == 2
    (first,) = report.details
    assert (first.reward, first.prompt_index, first.rollout) == ("hostile", 7, 1)


@pytest.mark.parametrize(
    "word",
    ["flood", "fork", "forked sleeper", "forked holder", "numpy", "numpy bool", "bool", "int"],
)
def test_harmless_oddities_score(hostile: Scorer, word: str) -> None:
    group = make_group("ok", word)
    report = hostile.score([group])
    assert [rollout.reward for rollout in group.rollouts] == [1.0, 1.0]
    assert not report.rewards[0].failures


def test_crash_is_noticed_while_a_forked_child_lives(hostile: Scorer) -> None:
    group = make_group("forked holder", "_exit")
    start = time.monotonic()
    hostile.score([group])
    assert [rollout.scores[0].failure for rollout in group.rollouts] == [None, "crashed"]
    assert time.monotonic() - start < 20  # did not wait for the wall-clock backstop


def test_wall_clock_backstop(hostile_file: str) -> None:
    cfg = RewardConfig(workers=1, wall_seconds=0.7)
    group = make_group("ok", "sleep")
    with Scorer([f"{hostile_file}:hostile"], cfg) as scorer:
        scorer.score([group])
    assert [rollout.reward for rollout in group.rollouts] == [1.0, None]
    assert group.rollouts[1].scores[0].failure == "timeout"
    assert "0.7 s of wall-clock time" in group.rollouts[1].scores[0].detail


def test_not_applicable_is_no_failure(hostile: Scorer) -> None:
    group = make_group("ok", "none")
    report = hostile.score([group])
    assert [rollout.reward for rollout in group.rollouts] == [1.0, None]
    assert group.rollouts[1].scores[0].failure is None
    assert report.rewards[0].not_applicable == 1


def test_wrong_length_is_not_hidden_by_a_retry(hostile_file: str) -> None:
    group = make_group("a", "b", "c")
    with Scorer([f"{hostile_file}:always_one"], RewardConfig(workers=1)) as scorer:
        report = scorer.score([group])
    assert [rollout.scores[0].failure for rollout in group.rollouts] == ["wrong length"] * 3
    assert report.rewards[0].failures == {"wrong length": 3}
    assert "returned 1 scores for 3 completions" in report.details[0].detail
