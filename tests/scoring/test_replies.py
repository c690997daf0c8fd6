"""Replies of workers: whatever a reward writes into the channel, only its call fails."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.groups import make_group
from rlsloth.config import RewardConfig
from rlsloth.scoring.replies import InvalidReplyError, check_ready, check_reply, most_bytes
from rlsloth.scoring.scorer import Scorer

pytestmark = pytest.mark.slow

REWARD = """
import json, os, sys

FD = int(sys.argv[1])

def score(completions, log_extra, log_metric, trainer_state, **_):
    word = completions[0]
    if word == "flood":
        try:
            while True: os.write(FD, b"x" * (1 << 20))
        except OSError: pass
    if word == "drip":
        import time
        while True: os.write(FD, b"x"); time.sleep(0.05)
    if word == "garbage":
        import time
        os.write(FD, b"[" * 100_000 + b"\\n"); time.sleep(1e9)
    if word == "long extra": log_extra("big", ["x" * (3 << 20)] * len(completions))
    if word == "huge": log_metric("mine", 1e308); log_metric("mine", 1e308)
    if word == "patched": json.dumps = lambda *a, **k: "{}"
    if word.startswith("line "): os.write(FD, word.removeprefix("line ").encode() + b"\\n")
    return [1.0] * len(completions)
"""
GOOD: dict[str, Any] = {
    "call": 1, "values": [0.5, None], "row_failures": [], "error": None, "user_error": None,
    "metrics": [["mine", 1.0]], "extras": {"found": [1, "x"]}, "retire": False,
}  # fmt: skip
FAILURE = {"row": 0, "kind": "raised", "detail": "ValueError"}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scorer]:
    path = tmp_path_factory.mktemp("rewards") / "writes.py"
    path.write_text(REWARD)
    cfg = RewardConfig(workers=1, wall_seconds=2, memory_gb=8)
    with Scorer([f"{path}:score"], cfg) as scorer:
        yield scorer


def failure(scorer: Scorer, word: str) -> tuple[str | None, str]:
    """Score one completion; then another one, which must be right."""
    group, other = make_group(word), make_group("fine")
    scorer.score([group])
    scorer.score([other])
    assert other.rollouts[0].reward == 1.0
    score = group.rollouts[0].scores[0]
    return score.failure, score.detail


@pytest.mark.parametrize(
    ("word", "kind", "words"),
    [
        ("flood", "invalid reply", f"more than {most_bytes(1):,} bytes"),
        ("drip", "timeout", "no result after 2 s"),
        ("long extra", "invalid reply", "log less with log_extra"),
        ("patched", None, ""),
        ("line {}", "invalid reply", "no 'call'"),
        ("line []", "invalid reply", "no 'call'"),
        ("line null", None, ""),
        ("line \x00\x01 no JSON", None, ""),  # a good reply follows
        ("line " + "[" * 100_000, None, ""),
        ("garbage", "invalid reply", "no JSON"),
        ('line {"died": "x"}', "crashed", "SIGKILL"),
        (
            "line " + json.dumps(GOOD | {"call": 0, "values": [9.0]}),
            "invalid reply",
            "another call",
        ),
    ],
)
def test_a_bad_reply_fails_its_call_alone(
    scorer: Scorer, word: str, kind: str | None, words: str
) -> None:
    start = time.monotonic()
    found, detail = failure(scorer, word)
    assert (found, words in detail) == (kind, True), detail
    assert time.monotonic() - start < 30


def test_metrics_too_large_for_a_mean_are_no_crash(scorer: Scorer) -> None:
    report = scorer.score([make_group("huge")])
    assert report.metrics["mine"] == float("inf")  # null in metrics.jsonl


CHANGES: list[Callable[[dict[str, Any]], Any]] = [
    lambda r: r.pop("values"),
    lambda r: r.update(values=[1.0]),
    lambda r: r.update(values=[1.0, float("nan")]),
    lambda r: r.update(values=[1.0, True]),
    lambda r: r.update(values=[1.0, "2"]),
    lambda r: r.update(values=[1.0, 10**400]),
    lambda r: r.update(values="12"),
    lambda r: r.update(row_failures=[FAILURE | {"row": 2}]),
    lambda r: r.update(row_failures=[FAILURE | {"kind": "\x1b[2J"}]),
    lambda r: r.update(row_failures=[FAILURE | {"detail": 1}]),
    lambda r: r.update(error={"row": 0}),
    lambda r: r.update(error=FAILURE),  # with values
    lambda r: r.update(user_error=["x"]),
    lambda r: r.update(metrics=[["mine"]]),
    lambda r: r.update(metrics=[["mine", "1"]]),
    lambda r: r.update(metrics=[["loss", 1.0]]),
    lambda r: r.update(metrics=[["m" * 1000, 1.0]]),
    lambda r: r.update(metrics=[["m", 1.0]] * 5000),
    lambda r: r.update(extras={"found": [1]}),
    lambda r: r.update(extras=[]),
    lambda r: r.update(retire=1),
    lambda r: r.update(call=2),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_reply_of_another_form_is_refused(change: Callable[[dict[str, Any]], Any]) -> None:
    assert check_reply(json.loads(json.dumps(GOOD)), 1, 2, ["loss"])["values"] == [0.5, None]
    reply = json.loads(json.dumps(GOOD))
    change(reply)
    with pytest.raises(InvalidReplyError):
        check_reply(reply, 1, 2, ["loss"])


def mutated(value: Any, random_: random.Random) -> Any:
    """A copy of a JSON value with one part replaced, dropped or doubled."""
    odd: list[Any] = [
        None,
        True,
        -1,
        1e308,
        float("nan"),
        "\x1b]0;x\x07",
        [],
        {},
        [[[]]],
        "x" * 500,
        2**70,
    ]
    if isinstance(value, dict) and value and random_.random() < 0.8:
        key = random_.choice(list(value))
        changed = {**value, key: mutated(value[key], random_)}
        if random_.random() < 0.2:
            changed.pop(key)
        return changed
    if isinstance(value, list) and value and random_.random() < 0.7:
        at = random_.randrange(len(value))
        return [*value[:at], mutated(value[at], random_), *value[at + random_.randrange(2) :]]
    return random_.choice(odd)


def test_no_mutated_reply_raises_anything_else() -> None:
    random_ = random.Random(0)
    refused = 0
    for _ in range(2000):
        for check in (
            lambda: check_reply(mutated(GOOD, random_), 1, 2, ["loss"]),
            lambda: check_ready(
                mutated(
                    {"rewards": [{"accepts": ["a"], "required": [], "parameters": []}],
                     "error": None},
                    random_,
                ),
                1,
            ),
        ):  # fmt: skip
            try:
                check()
            except InvalidReplyError:
                refused += 1
    assert refused > 2500


def test_extras_of_an_ordinary_size_pass(tmp_path: Path) -> None:
    path = tmp_path / "r.py"
    path.write_text(
        "def score(completions, log_extra, **_):\n"
        "    log_extra('text', ['x' * 200_000] * len(completions))\n"
        "    return [1.0] * len(completions)\n"
    )
    group = make_group("a", "b", "c")
    with Scorer([f"{path}:score"], RewardConfig(workers=1)) as scorer:
        scorer.score([group])
    assert [len(r.extras["text"]) for r in group.rollouts] == [200_000] * 3
