"""Results of evaluations: samples without a verdict are no wrong answers."""

from __future__ import annotations

import pytest

from helpers.groups import make_group
from rlsloth.errors import UserError
from rlsloth.evaluation.result import assess, describe, paired_scores
from rlsloth.records import Group, Score


def scored(index: int, *values: float | str | None, texts: tuple[str, ...] = ()) -> Group:
    """A group with scores; a text is a kind of failure."""
    group = make_group(*(texts or ["7"] * len(values)), index=index)
    for rollout, value in zip(group.rollouts, values, strict=True):
        if isinstance(value, str):
            rollout.scores = (Score("math", None, value, "why"),)
        else:
            rollout.scores = (Score("math", value),)
    return group


def test_failed_samples_are_left_out_and_counted() -> None:
    result = assess([scored(0, 1.0, "timeout"), scored(1, 0.0, 1.0)], 0, 1.0)
    assert result.avg.value == pytest.approx(0.75)
    assert (result.failed, result.left_out, result.problems) == (1, 0, 2)
    assert dict(result.passed)[2].value == 1
    assert "1 samples without a verdict" in describe(result)
    assert result.metrics()["failed"] == 1


def test_a_problem_without_a_verdict_is_left_out() -> None:
    groups = [scored(0, 1.0, 1.0), scored(1, None, None), scored(2, 0.0, 0.0)]
    result = assess(groups, 0, 1.0)
    assert (result.avg.value, result.problems, result.left_out) == (0.5, 2, 1)
    assert result.rows == (0, 2)
    other = assess([scored(0, 0.0), scored(1, 1.0), scored(2, 1.0)], 0, 1.0)
    assert paired_scores(result, other) == ([1.0, 0.0], [0.0, 1.0])


def test_no_verdict_at_all_names_row_and_remedy() -> None:
    with pytest.raises(UserError, match=r"row 5.*--eval\.reward"):
        assess([scored(4, None)], 0, 1.0)


def test_a_cut_off_sample_is_wrong() -> None:
    result = assess([scored(0, 1.0, 1.0, texts=("cut", "7"))], 0, 1.0)
    assert result.avg.value == 0.5


def test_drafts_do_not_vote() -> None:
    texts = (r"<think>\boxed{5}</think>7", r"<think>\boxed{5}</think>7.0", "5")
    result = assess([scored(0, 1.0, 1.0, 0.0, texts=texts)], 0, 1.0)
    assert result.majority.value == 1
