"""``log_metric`` and ``log_extra`` of rewards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.groups import make_group
from rlsloth.config import RewardConfig
from rlsloth.errors import UserError
from rlsloth.records import Prompt
from rlsloth.run.metrics import TRAINER_METRICS
from rlsloth.scoring.reward_log import RewardLog
from rlsloth.scoring.scorer import Scorer

REWARD = """
def first(completions, log_extra, log_metric, **_):
    if "fail" in completions and len(completions) > 1: raise ValueError
    log_extra("size", [len(c) for c in completions])
    log_metric("mine/longest", max(map(len, completions)))
    return [1.0] * len(completions)

def second(completions, log_extra, **_):
    if "none" not in completions: log_extra("note", [{"text": c} for c in completions])
    return [1.0] * len(completions)

def clash(completions, log_metric, **_):
    log_metric("loss", 1.0)
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "logging.py"
    path.write_text(REWARD)
    return path


@pytest.fixture(scope="module")
def scorer(file: Path) -> Iterator[Scorer]:
    with Scorer([f"{file}:first", f"{file}:second"], RewardConfig(workers=1)) as scorer:
        yield scorer


def log(rows: int = 2) -> RewardLog:
    return RewardLog("tidy", rows, TRAINER_METRICS)


def test_columns_reach_the_rollouts(scorer: Scorer) -> None:
    groups = [make_group("a", "bcd"), make_group("none", "ef")]
    report = scorer.score(groups)
    assert [rollout.extras for group in groups for rollout in group.rollouts] == [
        {"size": 1, "note": {"text": "a"}},
        {"size": 3, "note": {"text": "bcd"}},
        {"size": 4},
        {"size": 2},
    ]
    assert report.metrics["mine/longest"] == 3.5  # the mean over the calls


def test_columns_of_completions_scored_one_by_one_are_in_place(scorer: Scorer) -> None:
    group = make_group("fail", "ab", "abc")
    report = scorer.score([group])
    assert [rollout.extras["size"] for rollout in group.rollouts] == [4, 2, 3]
    assert report.metrics["mine/longest"] == 3.0
    assert report.metrics["rewards/first/retried_groups"] == 1
    assert report.metrics["rewards/second/retried_groups"] == 0


def test_a_metric_of_the_trainer_is_refused_before_anything_is_sampled(file: Path) -> None:
    cfg = RewardConfig(workers=1)
    with Scorer([f"{file}:clash"], cfg, reserved_metrics=TRAINER_METRICS) as scorer:
        with pytest.raises(UserError, match=r"'clash'.*'loss'.*another name"):
            scorer.check([Prompt(0, "q", {})])
        with pytest.raises(UserError, match="'loss'"):
            scorer.score([make_group("a")])


@pytest.mark.parametrize(
    "name",
    ["loss", "step", "reward", "time/rollout", "eval_accuracy", "rewards/tidy/mean", "kl",
     "sampling/sampling_logp_difference/mean"],
)  # fmt: skip
def test_names_of_the_trainer(name: str) -> None:
    with pytest.raises(UserError, match=f"'tidy'.*{name}"):
        log().metric(name, 1.0)


@pytest.mark.parametrize("name", ["tidy", "rewards/tidy/digits", "completions/digits", "Loss"])
def test_names_of_a_reward(name: str) -> None:
    entries = log()
    entries.metric(name, np.float32(0.5))  # type: ignore[arg-type]
    assert entries.metrics == [(name, 0.5)]


@pytest.mark.parametrize(
    ("values", "plain"),
    [
        ([1, "a"], [1, "a"]),
        ((True, None), [True, None]),
        (np.array([1, 2]), [1, 2]),
        ([np.float64(0.5), np.array([1.0])], [0.5, [1.0]]),
        (torch.tensor([1.5, 2.0]), [1.5, 2.0]),
    ],
)
def test_values_become_plain(values: Any, plain: list[Any]) -> None:
    entries = log()
    entries.extra("column", values)
    assert entries.extras == {"column": plain}
    assert [type(value) for value in entries.extras["column"]] == [type(value) for value in plain]


def test_other_values_fail_in_the_reward() -> None:
    with pytest.raises(ValueError, match=r"'column'.*3 values for 2 completions"):
        log().extra("column", [1, 2, 3])
    with pytest.raises(TypeError):
        log().extra("column", [object(), object()])
