"""Columns of the saved samples that rewards log, and names that the trainer's metrics have."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from helpers.groups import make_group
from rlsloth.records import Clipping, Group, LossStats, Score, StepStats
from rlsloth.run.metrics import TRAINER_METRICS, UpdateFigures, rollout_metrics, update_metrics
from rlsloth.run.report.samples import embedded_samples
from rlsloth.run.samples import write_samples


def scored(*extras: dict[str, Any], **fields: Any) -> Group:
    group = make_group(*("ab" for _ in extras))
    for rollout, columns in zip(group.rollouts, extras, strict=True):
        rollout.scores = (Score("right", 1.0),)
        rollout.reward, rollout.extras = 1.0, columns
        for name, value in fields.items():
            setattr(rollout, name, value)
    return group


def saved(folder: Path, *groups: Group) -> dict[str, list[Any]]:
    path = folder / "samples" / "step_00001.parquet"
    path.parent.mkdir(exist_ok=True)
    write_samples(path, 1, groups, ["right"])
    columns: dict[str, list[Any]] = pq.read_table(path).to_pydict()
    return columns


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ([1, 2], [1, 2]),
        ([1, 0.5], [1.0, 0.5]),
        ([True, None], [True, None]),
        (["a", "lone \ud800"], ["a", "lone \\ud800"]),
        ([None, None], [None, None]),
        ([True, 1], ["true", "1"]),
        (["a", 1], ['"a"', "1"]),
        ([{"a": [1]}, None], ['{"a": [1]}', None]),
        ([10**30, 1], [str(10**30), "1"]),
    ],
)
def test_logged_columns_are_saved(tmp_path: Path, values: list[Any], column: list[Any]) -> None:
    table = saved(tmp_path, scored(*({"mine": value} for value in values)))
    assert table["mine"] == column
    assert [type(value) for value in table["mine"]] == [type(value) for value in column]
    assert list(table)[:4] == ["step", "prompt", "completion", "right"]


def test_a_column_of_some_rollouts_is_null_for_the_others(tmp_path: Path) -> None:
    table = saved(tmp_path, scored({"a": 1}, {}), scored({"b": 2.5}))
    assert (table["a"], table["b"]) == ([1, None, None], [None, None, 2.5])


def test_a_column_named_like_one_of_the_samples_gets_its_own(tmp_path: Path) -> None:
    table = saved(tmp_path, scored({"prompt": 1, "right": 2, "overlong_penalty": 3}))
    assert (table["prompt"], table["right"]) == (["q"], [1.0])
    assert [table[f"extra/{name}"] for name in ("prompt", "right", "overlong_penalty")] == [
        [1],
        [2],
        [3],
    ]


def test_the_report_shows_logged_columns_apart_from_rewards(tmp_path: Path) -> None:
    saved(tmp_path, scored({"mine": 7}, {}))
    (step,) = embedded_samples(tmp_path, pytest.fail)["steps"]
    assert step["rewards"] == ["right"]
    assert [row["extras"] for row in step["rows"]] == [["mine: 7"], []]


def test_the_overlong_penalty_is_a_figure_of_its_own(tmp_path: Path) -> None:
    plain, penalized = scored({}, {}), scored({}, {})
    penalized.rollouts[0].overlong_penalty, penalized.rollouts[1].overlong_penalty = -0.5, 0.0
    assert "overlong_penalty" not in saved(tmp_path, plain)
    assert saved(tmp_path, penalized)["overlong_penalty"] == [-0.5, 0.0]
    assert saved(tmp_path, penalized)["weighted_reward"] == [1.0, 1.0]
    before, after = (rollout_metrics([g], ["right"], num_tokens=1) for g in (plain, penalized))
    assert "overlong_penalty" not in before
    assert after["overlong_penalty"] == -0.25
    assert after["reward"] == before["reward"] == 1.0
    assert (before["frac_reward_zero_std"], after["frac_reward_zero_std"]) == (1.0, 0.0)


@pytest.mark.parametrize("clipping", ["both", "high"])
def test_every_metric_of_the_trainer_has_a_reserved_name(clipping: Clipping) -> None:
    figures = UpdateFigures(
        1.0, 1.0, LossStats(tokens=1), 1.0, 1.0, 1.0, 1, StepStats(1.0, 1.0, False)
    )
    group = scored({}, overlong_penalty=-0.5)
    tools = Group(type(group.prompt)(0, "q", {}, tools=({"type": "function"},)), [], group.rollouts)
    names = {
        *rollout_metrics([tools], ["right"], num_tokens=1),
        *update_metrics([figures], clipping=clipping, beta=0.1),
    }
    free = [n for n in names if not any(fnmatchcase(n, pattern) for pattern in TRAINER_METRICS)]
    assert not free
