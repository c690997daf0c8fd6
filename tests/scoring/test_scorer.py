"""The scorer: arguments and results of rewards, and data that it refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.groups import make_group
from rlsloth.config import RewardConfig
from rlsloth.errors import UserError
from rlsloth.records import Group, Prompt
from rlsloth.scoring.scorer import Scorer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def contract(hostile_file: str) -> Iterator[Scorer]:
    names = ("mutate", "short", "scalar", "above_mean", "later", "logs")
    cfg = RewardConfig(workers=1, params={"logs": {"unit": 10}})
    with Scorer([f"{hostile_file}:{name}" for name in names], cfg) as scorer:
        yield scorer


def test_contract(contract: Scorer) -> None:
    columns: dict[str, Any] = {"tags": ["a"], "entry": {"n": 1}}
    groups = [make_group("aa", "cut", **columns), make_group("bbbb", **columns)]
    report = contract.score(groups, step=5)
    values = [[score.value for score in r.scores] for g in groups for r in g.rollouts]
    # mutate's changes do not reach the copies of later calls; above_mean saw the whole group.
    assert values == [
        [1.0, None, None, -0.5, 5.0, 20.0],
        [1.0, None, None, 0.5, None, 30.0],
        [1.0, None, None, 0.0, 5.0, 40.0],
    ]
    failures = {reward.name: dict(reward.failures) for reward in report.rewards}
    assert failures["short"] == {"wrong length": 3}
    assert failures["scalar"] == {"wrong type": 3}
    assert report.rewards[1].retried_groups == 0
    assert report.rewards[2].retried_groups == 1
    assert [r.extras for g in groups for r in g.rollouts] == [{"letters": n} for n in (2, 3, 4)]
    assert report.metrics["longest"] == 3.5
    assert report.metrics["rewards/scalar/retried_groups"] == 1
    assert [r.reward for g in groups for r in g.rollouts] == [None] * 3  # two rewards failed


def test_submitted_groups_score_the_same(contract: Scorer) -> None:
    def groups() -> list[Group]:
        columns: dict[str, Any] = {"tags": ["a"], "entry": {"n": 1}}
        return [make_group(*texts, **columns) for texts in (["aa", "cut"], ["bbbb"], ["c", "dd"])]

    plain, early = groups(), groups()
    want = contract.score(plain, step=5)
    for group in reversed(early[1:]):
        contract.submit(group, step=5)
    got = contract.score(early, step=5)
    assert early == plain
    assert (got.metrics, got.details) == (want.metrics, want.details)
    for mine, theirs in zip(got.rewards, want.rewards, strict=True):
        assert (mine.scored, mine.failures) == (theirs.scored, theirs.failures)


def test_a_fault_of_a_submitted_group_is_raised_by_score(hostile_file: str) -> None:
    with Scorer([f"{hostile_file}:needs"], RewardConfig(workers=1)) as scorer:
        group = make_group("ok", answer="1")
        scorer.submit(group)
        with pytest.raises(UserError, match="needs a column 'anser'"):
            scorer.score([make_group("ok", anser="1"), group])


def test_close_does_not_wait_for_submitted_groups(hostile_file: str) -> None:
    """Sampling may fail after some groups are complete."""
    start = time.monotonic()
    with Scorer([f"{hostile_file}:hostile"], RewardConfig(workers=1)) as scorer:
        for _ in range(3):
            scorer.submit(make_group("sleep"))
    assert time.monotonic() - start < 20  # not three times the 60 s of the backstop


def test_weights_and_chat_messages(hostile_file: str) -> None:
    specs = [f"{hostile_file}:chats", f"{hostile_file}:later", f"{hostile_file}:hostile"]
    with Scorer([*specs[:2], "length"], RewardConfig(workers=1, weights=[2, 0.5, 0])) as scorer:
        group = make_group("yes", "cut", "no", chat=True)
        scorer.score([group], step=3)
    assert [rollout.reward for rollout in group.rollouts] == [3.5, 0.0, 1.5]


def test_bad_names_fail_at_once(hostile_file: str) -> None:
    with pytest.raises(UserError, match="did you mean 'math_verify'"):
        Scorer(["math_verfy"], RewardConfig())
    with pytest.raises(UserError, match=r"name the function, as in \./r\.py:reward$"):
        Scorer(["./r.py:"], RewardConfig())
    with pytest.raises(UserError, match="no file"):
        Scorer(["./nowhere.py:reward"], RewardConfig())
    with pytest.raises(UserError, match="2 of --rewards are called 'hostile'"):
        Scorer([f"{hostile_file}:hostile"] * 2, RewardConfig())
    with pytest.raises(UserError, match=r"'lenght'.*did you mean 'length'"):
        Scorer(["length"], RewardConfig(params={"lenght": {"target": 5}}))
    with pytest.raises(UserError, match="no rewards"):
        Scorer([], RewardConfig())


@pytest.mark.parametrize(
    ("spec", "params", "message"),
    [
        ("{file}:hostil", {}, "did you mean 'hostile'"),
        ("{file}:HOSTILE", {}, r"hostile\.py has no 'HOSTILE'"),
        ("no_such_pkg.rewards:tidy", {}, "cannot import no_such_pkg"),
        ("length", {"length": {"tolerence": 1}}, "did you mean 'tolerance'"),
    ],
)
def test_bad_rewards_fail_in_the_worker(
    hostile_file: str, spec: str, params: dict[str, Any], message: str
) -> None:
    spec = spec.format(file=hostile_file)
    cfg = RewardConfig(workers=1, params=params)
    with Scorer([spec], cfg) as scorer, pytest.raises(UserError, match=message):
        scorer.wait_ready()


def test_bad_columns(hostile_file: str) -> None:
    specs = [f"{hostile_file}:needs", f"{hostile_file}:hostile", "length"]
    with Scorer(specs[:1], RewardConfig(workers=1)) as scorer:
        with pytest.raises(UserError, match="needs a column 'anser'; did you mean 'answer'"):
            scorer.score([make_group("ok", answer="1")])
        with pytest.raises(UserError, match="column 'anser' cannot be passed"):
            scorer.score([make_group("ok", anser=object())])
        with pytest.raises(UserError, match="key 1"):
            scorer.score([make_group("ok", anser={"a": [{1: 2}]})])
        with pytest.raises(UserError, match="name of a reward argument"):
            scorer.score([make_group("ok", anser="1", prompts="1")])
        unused = make_group("ok", anser="1", picture=object())
        scorer.score([unused])  # a column that no reward takes may be anything
        assert unused.rollouts[0].reward == 0.0
    with (
        Scorer(specs[2:], RewardConfig(workers=1)) as scorer,
        pytest.raises(UserError, match=r"set reward\.params\.length\.target"),
    ):
        scorer.score([make_group("ok", target=3)])


def test_check_refuses_data_before_any_score(hostile_file: str) -> None:
    def prompts(*columns: dict[str, Any]) -> list[Prompt]:
        return [Prompt(index, "q", row) for index, row in enumerate(columns)]

    with Scorer(["length", f"{hostile_file}:needs"], RewardConfig(workers=1)) as scorer:
        scorer.check(prompts({"anser": 1}, {"anser": 2}))
        with pytest.raises(UserError, match=r"'needs' needs a column 'anser'.*\(row 2 has: b\)"):
            scorer.check(prompts({"anser": 1}, {"b": 2}))
        with pytest.raises(UserError, match="row 2, column 'anser' cannot be passed to reward"):
            scorer.check(prompts({"anser": 1}, {"anser": object()}))
        with pytest.raises(UserError, match=r"'prompts' .*has the name of a reward argument"):
            scorer.check(prompts({"anser": 1, "prompts": 2}))
    # A reward that checks its columns itself, and one that an empty completion breaks.
    with (
        Scorer(["math_verify"], RewardConfig(workers=1)) as scorer,
        pytest.raises(UserError, match="needs a column 'solution' or 'answer'"),
    ):
        scorer.check(prompts({"gold": "1"}))
    with Scorer([f"{hostile_file}:above_mean"], RewardConfig(workers=1)) as scorer:
        scorer.check([Prompt(0, ({"role": "user", "content": "q"},), {})])
        scorer.check([])


@pytest.mark.slow
def test_overhead_of_math_verify_on_integers(capsys: pytest.CaptureFixture[str]) -> None:
    groups = [
        make_group(*[rf"So \boxed{{{i}}}"] * 8, index=i, answer=f"#### {i}") for i in range(64)
    ]
    with Scorer(["math_verify"], RewardConfig(workers=2)) as scorer:
        scorer.wait_ready()
        start = time.perf_counter()
        report = scorer.score(groups)
        milliseconds = (time.perf_counter() - start) * 1e3
    with capsys.disabled():
        print(f"\nmath_verify, 64 groups of 8: {milliseconds:.0f} ms")
    assert report.rewards[0].scored == 512
    assert all(rollout.reward == 1.0 for group in groups for rollout in group.rollouts)
    assert milliseconds < 2000  # 30 to 60 on an idle machine
