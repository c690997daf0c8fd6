"""The overlong penalty and its place beside the reward."""

from __future__ import annotations

import pytest
from trl.rewards import get_soft_overlong_punishment

from helpers.groups import make_group
from rlsloth.errors import UserError
from rlsloth.scoring.shaping import overlong_penalty, penalize_overlong


def test_overlong_penalty() -> None:
    for length, penalty in [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (130, -1.0)]:
        assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)
    trl = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    wanted = trl(completion_ids=[[0] * n for n in range(131)])
    assert [overlong_penalty(n, 100, 20) for n in range(131)] == pytest.approx(wanted)
    assert overlong_penalty(100, 100, 0) == 0
    with pytest.raises(UserError, match=r"overlong_buffer \(11\).*max_tokens \(10\)"):
        overlong_penalty(5, 10, 11)


def test_the_penalty_leaves_the_reward() -> None:
    group = make_group("a" * 4, "b" * 9, "c" * 12)
    for rollout, reward in zip(group.rollouts, (1.0, 0.5, None), strict=True):
        rollout.reward = reward
    penalize_overlong([group], max_tokens=10, buffer=0)
    assert [r.overlong_penalty for r in group.rollouts] == [None] * 3
    assert [r.shaped_reward for r in group.rollouts] == [1.0, 0.5, None]
    penalize_overlong([group], max_tokens=10, buffer=4)
    assert [r.overlong_penalty for r in group.rollouts] == [0.0, -0.75, -1.0]
    assert [r.reward for r in group.rollouts] == [1.0, 0.5, None]
    assert [r.shaped_reward for r in group.rollouts] == [1.0, -0.25, None]
