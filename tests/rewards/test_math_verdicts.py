"""Verdicts of math_verify in a run: counted apart, and a failure is no wrong answer."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from helpers.groups import make_group
from rlsloth.config import RewardConfig
from rlsloth.evaluation.result import verdict_counts
from rlsloth.rewards import math_verify as module
from rlsloth.rewards._math.budget import AnswerLimits, OutOfTimeError
from rlsloth.rewards.math_verify import math_verify
from rlsloth.rewards.reasoning_gym import reasoning_gym
from rlsloth.scoring.scorer import Scorer


def spin(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() < start + seconds:
        pass


def test_verdicts_are_logged_and_counted() -> None:
    texts = (r"\boxed{4}", r"\boxed{5}", r"\boxed{\forall 4}", r"\boxed{9^{9^{9^9}}}")
    group = make_group(*texts, answer="4")
    with Scorer(["math_verify"], RewardConfig(workers=1)) as scorer:
        report = scorer.score([group])
    verdicts = [rollout.extras["math_verify/verdict"] for rollout in group.rollouts]
    assert verdicts == ["right", "wrong", "unparsed", "timeout"]
    assert [rollout.reward for rollout in group.rollouts] == [1.0, 0.0, 0.0, None]
    assert report.rewards[0].failures == {"timeout": 1}
    assert report.rewards[0].retried_groups == 0
    assert "too large" in group.rollouts[3].scores[0].detail
    figures = {name: report.metrics[f"rewards/math_verify/{name}"] for name in set(verdicts)}
    assert figures == dict.fromkeys(verdicts, 0.25)
    assert report.metrics["rewards/math_verify/error"] == 0
    (line,) = verdict_counts([group])
    assert line.startswith("verdicts of math_verify: ")
    assert "1 timeout" in line


def test_a_slow_answer_costs_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(text: str, _gold: Any) -> str:
        if text == "slow":
            spin(5)
        if text == "broken":
            raise ZeroDivisionError("in the grader")
        return "right"

    monkeypatch.setattr(module, "judge", judge)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.2)
    failures: list[tuple[int, str, str]] = []
    scores = math_verify(
        ["slow", "7", "broken"],
        answer=["7"] * 3,
        log_failure=lambda *failure: failures.append(failure),
    )
    assert scores == [None, 1.0, None]
    assert [failure[:2] for failure in failures] == [(0, "timeout"), (2, "raised")]
    assert "0.2 s" in failures[0][2]
    assert "ZeroDivisionError" in failures[1][2]


def test_limits_of_time_nest() -> None:
    def outer(_signum: int, _frame: Any) -> None:
        raise TimeoutError

    def inner() -> None:
        with AnswerLimits() as limits:
            with pytest.raises(OutOfTimeError), limits.limit(0.1):
                spin(2)
            with limits.limit(0.5):
                spin(2)

    before = signal.signal(signal.SIGPROF, outer)
    signal.setitimer(signal.ITIMER_PROF, 0.3)
    with pytest.raises(TimeoutError):
        inner()
    signal.setitimer(signal.ITIMER_PROF, 0.3)
    with AnswerLimits() as limits, limits.limit(0.2):
        pass
    with pytest.raises(TimeoutError):
        spin(2)
    signal.signal(signal.SIGPROF, before)


def test_a_plain_call_needs_golds_alone() -> None:
    assert math_verify(completions=[r"\boxed{1/2}", "1"], answer=["0.5", "0.5"]) == [1.0, 0.0]
    chat = [[{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{1/2}"}]}]]
    assert math_verify(chat, solution=["so $1/2$"], answer=["0.5"]) == [1.0]


def test_nonsense_that_a_scorer_raises_on_scores_zero() -> None:
    entry = {"question": "Factors of 866?", "answer": "2 × 433", "metadata": {"factors": [2, 433]}}  # noqa: RUF001
    texts = [f"<answer>{text}</answer>" for text in ("2 × 433", "some birds", "what?")]  # noqa: RUF001
    logged: dict[str, float] = {}
    scores = reasoning_gym(
        texts, ["prime_factorization"] * 3, [entry] * 3, log_metric=logged.__setitem__
    )
    assert scores == [1, 0, 0]
    assert logged["rewards/reasoning_gym/scorer_raised"] > 0


def test_a_row_that_its_scorer_cannot_read_is_a_failure() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        reasoning_gym(["<answer>some</answer>"], ["prime_factorization"], [{"answer": "birds"}])


def test_a_draft_is_no_answer_to_reasoning_gym() -> None:
    entry = {"question": "4 - 1 =", "answer": "3", "metadata": {}}
    text = "<think><answer>3</answer></think>"
    assert reasoning_gym([text], ["chain_sum"], [entry]) == [0]
