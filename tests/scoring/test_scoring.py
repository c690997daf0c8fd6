"""The scorer against hostile rewards: the step goes on, and the culprit alone is named."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.groups import make_group
from rlsloth.config import RewardConfig
from rlsloth.errors import UserError
from rlsloth.records import Group, Prompt
from rlsloth.scoring.scorer import Scorer

HOSTILE = """
import ctypes, os, subprocess, sys, time
import numpy as np

def act(word):
    if word == "raise": raise ValueError("no digits")
    if word == "exit": sys.exit(0)
    if word == "sleep": time.sleep(1000)
    if word == "loop":
        while True: pass
    if word == "swallow":
        while True:
            try:
                while True: pass
            except: pass
    if word == "c loop": return 3 ** (3 ** 30)
    if word == "nan": return float("nan")
    if word == "inf": return -np.inf
    if word == "huge": return 10 ** 400
    if word == "text": return "1.0"
    if word == "list": return [1.0]
    if word == "_exit": os._exit(3)
    if word == "segfault": ctypes.string_at(0)
    if word == "memory": return len(bytearray(10 ** 12))
    if word == "fork" and os.fork() == 0: return 0.0
    if word == "forked sleeper": subprocess.Popen(["sleep", "1000"])
    if word == "forked holder" and os.fork() == 0: time.sleep(1000)
    if word == "flood":
        for stream in (sys.stdout, sys.stderr): stream.write("x" * 10 ** 7)
        os.write(1, b"x" * 10 ** 6)
    if word == "none": return None
    if word == "numpy": return np.float32(1.0)
    if word == "numpy bool": return np.True_
    if word == "bool": return True
    if word == "int": return 1
    return 1.0

def hostile(completions, **columns):
    return [act(word) for word in completions]

def mutate(prompts, completions, tags, entry, **columns):
    scores = [float(entry == [{"n": 1}] * len(completions) and tags == [["a"]] * len(completions))]
    scores *= len(completions)
    for item in entry: item["n"] += 1
    for item in tags: item.clear()
    prompts.clear(), completions.clear(), columns.clear()
    return scores

def short(completions): return [1.0] * (len(completions) - 1)
def always_one(completions): return [1.0]
def scalar(completions): return 1.0
def above_mean(completions):
    mean = sum(map(len, completions)) / len(completions)
    return [len(c) - mean for c in completions]
async def later(completions, trainer_state, finish_reasons):
    import asyncio
    await asyncio.sleep(0)
    return [trainer_state.global_step if f == "stop" else None for f in finish_reasons]
def logs(completions, completion_ids, log_extra, log_metric, *, unit=1):
    log_extra("letters", [len(c) for c in completions])
    log_metric("longest", max(map(len, completions)))
    return [len(ids) * unit for ids in completion_ids]
def needs(completions, anser): return [0.0] * len(completions)
def chats(prompts, completions):
    return [float(p == [{"role": "user", "content": "q"}] and c[-1]["content"] == "yes")
            for p, c in zip(prompts, completions)]
def busy(completions):
    if completions[0] != "warm": subprocess.Popen(["sleep", "1000"]); 3 ** (3 ** 30)
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "hostile.py"
    path.write_text(HOSTILE)
    return str(path)


@pytest.fixture(scope="module")
def hostile(hostile_file: str) -> Iterator[Scorer]:
    cfg = RewardConfig(workers=2, cpu_seconds=0.3, wall_seconds=30, memory_gb=2)
    with Scorer([f"{hostile_file}:hostile"], cfg) as scorer:
        yield scorer


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


@pytest.fixture(scope="module")
def contract(hostile_file: str) -> Iterator[Scorer]:
    names = ("mutate", "short", "scalar", "above_mean", "later", "logs")
    cfg = RewardConfig(workers=1, params={"logs": {"unit": 10}})
    with Scorer([f"{hostile_file}:{name}" for name in names], cfg) as scorer:
        yield scorer


def test_contract(contract: Scorer) -> None:
    columns = {"tags": ["a"], "entry": {"n": 1}}
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
    assert report.extras == {"letters": [2, 3, 4]}
    assert report.metrics == {"longest": 3.5}
    assert [r.reward for g in groups for r in g.rollouts] == [
        None,
        None,
        None,
    ]  # two rewards failed
    assert report.rewards[0].cpu_seconds > 0


def test_submitted_groups_score_the_same(contract: Scorer) -> None:
    def groups() -> list[Group]:
        columns = {"tags": ["a"], "entry": {"n": 1}}
        return [make_group(*texts, **columns) for texts in (["aa", "cut"], ["bbbb"], ["c", "dd"])]

    plain, early = groups(), groups()
    want = contract.score(plain, step=5)
    for group in reversed(early[1:]):
        contract.submit(group, step=5)
    got = contract.score(early, step=5)
    assert early == plain
    assert (got.metrics, got.extras, got.details) == (want.metrics, want.extras, want.details)
    for mine, theirs in zip(got.rewards, want.rewards, strict=True):
        assert (mine.scored, mine.failures) == (theirs.scored, theirs.failures)


def test_what_goes_wrong_with_a_submitted_group_is_raised_by_score(hostile_file: str) -> None:
    with Scorer([f"{hostile_file}:needs"], RewardConfig(workers=1)) as scorer:
        group = make_group("ok", answer="1")
        scorer.submit(group)
        with pytest.raises(UserError, match="needs a column 'anser'"):
            scorer.score([make_group("ok", anser="1"), group])


def test_close_does_not_wait_for_submitted_groups(hostile_file: str) -> None:
    """As when sampling fails after some groups are complete."""
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
    with pytest.raises(UserError, match="2 rewards are called 'hostile'"):
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
        scorer.score([unused])  # a column that no reward asks for may be anything
        assert unused.rollouts[0].reward == 0.0
    with (
        Scorer(specs[2:], RewardConfig(workers=1)) as scorer,
        pytest.raises(UserError, match=r"set reward\.params\.length\.target"),
    ):
        scorer.score([make_group("ok", target=3)])


def test_wrong_length_is_not_hidden_by_a_retry(hostile_file: str) -> None:
    group = make_group("a", "b", "c")
    with Scorer([f"{hostile_file}:always_one"], RewardConfig(workers=1)) as scorer:
        report = scorer.score([group])
    assert [rollout.scores[0].failure for rollout in group.rollouts] == ["wrong length"] * 3
    assert report.rewards[0].failures == {"wrong length": 3}
    assert "returned 1 scores for 3 completions" in report.details[0].detail


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
    # A reward that says itself what it misses; and one that an empty answer breaks.
    with (
        Scorer(["math_verify"], RewardConfig(workers=1)) as scorer,
        pytest.raises(UserError, match="needs a column 'solution' or 'answer'"),
    ):
        scorer.check(prompts({"gold": "1"}))
    with Scorer([f"{hostile_file}:above_mean"], RewardConfig(workers=1)) as scorer:
        scorer.check([Prompt(0, ({"role": "user", "content": "q"},), {})])
        scorer.check([])


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _session_members(session: int) -> list[int]:
    """Live processes of a session; a worker's supervisor leads one of its own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _alive(int(entry.name)):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session:
                found.append(int(entry.name))
    return found


def _wait_until_empty(sessions: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(_session_members(session) for session in sessions):
        assert time.monotonic() < deadline, [_session_members(s) for s in sessions]
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts by /proc")


@needs_proc
def test_close_leaves_nothing_behind(hostile_file: str) -> None:
    scorer = Scorer([f"{hostile_file}:hostile"], RewardConfig(workers=1))
    scorer.score([make_group("forked sleeper", "forked holder")])
    sessions = [worker.pid for worker in scorer._workers]
    assert len(_session_members(sessions[0])) == 4  # supervisor, worker, sleep, forked worker
    scorer.close()
    _wait_until_empty(sessions)


@needs_proc
def test_workers_die_with_a_killed_trainer(hostile_file: str) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from helpers.groups import make_group
        from rlsloth.config import RewardConfig
        from rlsloth.scoring.scorer import Scorer
        scorer = Scorer([{hostile_file + ":busy"!r}], RewardConfig(workers=1, cpu_seconds=1000))
        scorer.score([make_group("warm")])
        print(*(worker.pid for worker in scorer._workers), flush=True)
        scorer.score([make_group("go")])
        """
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    sessions = [int(pid) for pid in trainer.stdout.readline().split()]
    deadline = time.monotonic() + 10
    while len(_session_members(sessions[0])) < 3:  # supervisor, busy worker, its sleep
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    _wait_until_empty(sessions)


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
