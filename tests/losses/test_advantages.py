"""Advantages: hand-computed numbers and TRL's own lines."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from rlsloth.config import AdvantageConfig
from rlsloth.losses.advantages import assign_advantages
from rlsloth.records import Group, Prompt, Rollout

KINDS = ["group", "batch", "none", "leave_one_out"]


def make_group(rewards: list[float | None]) -> Group:
    rollouts = [
        Rollout(
            token_ids=[1, 2],
            loss_mask=[True, False],
            logprobs=[-1.0, 0.0],
            policy_version=[0, -1],
            finish="stop",
            text="",
            messages=[],
            reward=reward,
            advantages=[9.0, 9.0],
        )
        for reward in rewards
    ]
    return Group(Prompt(0, "question", {}), [1], rollouts)


def advantages(rewards: list[list[float | None]], kind: Any) -> list[list[float]]:
    groups = [make_group(r) for r in rewards]
    assign_advantages(groups, AdvantageConfig(normalize=kind))
    assert all(r.advantages[1] == 0.0 for g in groups for r in g.rollouts)  # not sampled
    return [[r.advantages[0] for r in g.rollouts] for g in groups]


def test_by_hand() -> None:
    rewards: list[list[float | None]] = [[0, 0, 0, 1], [1, 3, None, 2]]
    # Second group: mean 2, std 1. First: mean 1/4, std 1/2.
    expected: dict[str, list[list[float]]] = {
        "group": [[-0.25 / 0.5001] * 3 + [0.75 / 0.5001], [-1 / 1.0001, 1 / 1.0001, 0, 0]],
        "none": [[-0.25, -0.25, -0.25, 0.75], [-1, 1, 0, 0]],
        "leave_one_out": [[-1 / 3, -1 / 3, -1 / 3, 1], [-1.5, 1.5, 0, 0]],
    }
    # All seven: mean 1, squared deviations 3 + 0 + 0 + 4 + 1.
    std = (8 / 6) ** 0.5 + 1e-4
    expected["batch"] = [[a / std for a in row] for row in expected["none"]]
    for kind in KINDS:
        for got, wanted in zip(advantages(rewards, kind), expected[kind], strict=True):
            assert got == pytest.approx(wanted, abs=1e-12), kind


def trl_advantages(rewards: list[list[float | None]], scale: str) -> list[float]:
    """TRL's advantages, by running those very statements of its source."""
    function = GRPOTrainer._generate_and_score_completions
    body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body  # type: ignore[attr-defined]
    targets = [ast.unparse(s.targets[0]) if isinstance(s, ast.Assign) else "" for s in body]
    first = targets.index("unscorable_mask")
    statements = body[first : targets.index("process_slice")]
    assert "nan_to_num" in ast.unparse(statements[-1])
    flat = [float("nan") if r is None else float(r) for row in rewards for r in row]
    names: dict[str, Any] = {
        "self": SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize",
            reward_weights=torch.ones(1, dtype=torch.float64),
            scale_rewards=scale,
        ),
        "torch": torch,
        "nanstd": nanstd,
        "device": "cpu",
        "num_generations": len(rewards[0]),
        "rewards_per_func": torch.tensor(flat, dtype=torch.float64)[:, None],
    }
    exec(compile(ast.Module(statements, []), "trl", "exec"), names)
    result: list[float] = names["advantages"].tolist()
    return result


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equals_trl(scale: str) -> None:
    rewards: list[list[float | None]] = [
        [0.0, 1.0, 1.0, 0.25],
        [None, 2.0, -1.0, None],
        [None, None, None, None],
        [None, None, 0.7, None],
        [0.5, 0.5, 0.5, 0.5],
    ]
    got = [a for row in advantages(rewards, scale) for a in row]
    # TRL computes the correction n / (n - 1) in float32.
    assert got == pytest.approx(trl_advantages(rewards, scale), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_rewards_give_exact_zeros(kind: str) -> None:
    dust = [0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]
    cancelled = [0.1 + 0.2 - 0.3, 0.0]
    rows: list[list[Any]] = [
        [0.1] * 8,
        [1 / 3] * 7,
        [-2.7] * 3,
        dust,
        cancelled,
        [None, 0.7],
        [None] * 4,
        [0.4],
    ]
    for row in rows:
        for got in advantages([row, [0.0, 1.0]], kind)[:1]:
            assert got == [0.0] * len(row)


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_of_a_group_sum_to_zero(kind: str) -> None:
    for row in advantages([[0.1, 0.9, 0.4], [5.0, -3.0, None]], kind):
        assert sum(row) == pytest.approx(0, abs=1e-9)
        assert any(a != 0 for a in row)


def test_no_groups() -> None:
    assign_advantages([], AdvantageConfig())
