"""Metrics of a step: hand-computed figures, and agreement with TRL."""

from __future__ import annotations

import math
from typing import Any

import pytest

from helpers.run_folders import NAMES, make_group, make_rollout
from rlsloth.records import LossStats, StepStats
from rlsloth.run.metrics import UpdateFigures, count_tokens, rollout_metrics, update_metrics


def test_rollout_metrics_equal_hand_computed_figures():
    groups = [
        make_group(
            make_rollout(1.0, 0.5, length=2),
            make_rollout(0.0, 0.5, length=4),
            make_rollout(0.0, None, length=9, finish="length"),
            make_rollout(None, 1.0, failure="timeout", length=5),
        ),
        make_group(*(make_rollout(1.0, 0.0, length=4) for _ in range(4))),
    ]
    metrics = rollout_metrics(groups, NAMES, num_tokens=count_tokens(groups))
    # rewards: 1.5 0.5 0 - 1 1 1 1; correct: 1 0 0 - 1 1 1 1; tags: 0.5 0.5 - 1 0 0 0 0
    assert metrics["reward"] == pytest.approx(6 / 7)
    squares = sum((reward - 6 / 7) ** 2 for reward in (1.5, 0.5, 0, 1, 1, 1, 1))
    assert metrics["reward_std"] == pytest.approx(math.sqrt(squares / 6))
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/correct/mean"] == pytest.approx(5 / 7)
    assert metrics["rewards/correct/failures"] == 1
    assert metrics["rewards/correct/not_applicable"] == 0
    assert metrics["rewards/tags/mean"] == pytest.approx(2 / 7)
    assert metrics["rewards/tags/not_applicable"] == 1
    assert metrics["completions/mean_length"] == (2 + 4 + 9 + 5 + 16) / 8
    assert metrics["completions/max_length"] == 9
    assert metrics["completions/max_terminated_length"] == 5
    assert metrics["completions/mean_terminated_length"] == pytest.approx(27 / 7)
    assert metrics["completions/clipped_ratio"] == 1 / 8
    assert metrics["num_tokens"] == 8 * 2 + 36
    assert "tools/call_frequency" not in metrics


def test_reward_figures_agree_with_trl():
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("trl.trainer.utils")
    groups = [
        make_group(make_rollout(1.0, 0.25), make_rollout(0.0, None), make_rollout(0.5, 1.0)),
        make_group(make_rollout(1.0, 0.0), make_rollout(1.0, 0.0), make_rollout(None, None)),
    ]
    metrics = rollout_metrics(groups, NAMES, num_tokens=0)
    per_reward = torch.tensor(
        [
            [math.nan if score.value is None else score.value for score in rollout.scores]
            for group in groups
            for rollout in group.rollouts
        ],
        dtype=torch.float64,
    )
    assert metrics["rewards/tags/std"] == pytest.approx(utils.nanstd(per_reward[:, 1]).item())
    assert metrics["reward_std"] == pytest.approx(utils.nanstd(per_reward.nansum(1)).item())
    assert metrics["frac_reward_zero_std"] == 0.0  # 1, 1 and an inapplicable 0 differ


def test_nothing_scored_and_nothing_terminated():
    groups = [make_group(*(make_rollout(None, None, failure="crashed", finish="length"),) * 2)]
    metrics = rollout_metrics(groups, NAMES, num_tokens=1)
    assert math.isnan(metrics["reward"])
    assert math.isnan(metrics["rewards/correct/mean"])
    assert metrics["completions/mean_terminated_length"] == 0  # as TRL logs it
    assert metrics["completions/clipped_ratio"] == 1


def test_tool_figures():
    tool = ({"type": "function"},)
    group = make_group(
        make_rollout(1.0, 0.0, tools=(3, 1)), make_rollout(0.0, 0.0, tools=(1, 0)), tools=tool
    )
    metrics = rollout_metrics([group], NAMES, num_tokens=0)
    assert metrics["tools/call_frequency"] == 2
    assert metrics["tools/failure_frequency"] == 0.25


def figures(**changes):
    stats = LossStats(
        tokens=100,
        policy=-20.0,
        kl=4.0,
        clipped_low=5.0,
        clipped_high=10.0,
        ratio=101.0,
        correction=99.0,
        corrected=2,
    )
    values: dict[str, Any] = {
        "loss": -0.1,
        "normalizer": 200.0,
        "stats": stats,
        "entropy": 50.0,
        "logp_gap": 0.7,
        "logp_gap_max": 0.3,
        "scored_tokens": 125,
        "step": StepStats(2.0, 1e-5, False),
    }
    return UpdateFigures(**(values | changes))


def test_update_metrics_equal_hand_computed_figures():
    metrics = update_metrics([figures()], clipping="both", beta=0.1)
    assert metrics == pytest.approx(
        {
            "loss": -0.1,
            "policy_loss": -0.1,
            "kl": 0.04,
            "entropy": 0.5,
            "clip_ratio/low_mean": 0.04,
            "clip_ratio/high_mean": 0.08,
            "clip_ratio/region_mean": 0.12,
            "importance_ratio/mean": 1.01,
            "sampling/sampling_logp_difference/mean": 0.007,
            "sampling/sampling_logp_difference/max": 0.3,
            "sampling/importance_sampling_ratio/mean": 0.99,
            "sampling/corrected_ratio": 0.02,
            "grad_norm": 2.0,
            "learning_rate": 1e-5,
            "skipped_updates": 0.0,
        }
    )


def test_updates_are_averaged_and_skips_counted():
    skipped = figures(logp_gap_max=0.9, loss=0.3, step=StepStats(math.nan, 1e-5, True))
    metrics = update_metrics([figures(), skipped], clipping="high", beta=0.0)
    assert metrics["loss"] == pytest.approx(0.1)
    assert metrics["sampling/sampling_logp_difference/max"] == 0.9
    assert metrics["skipped_updates"] == 1
    assert math.isnan(metrics["grad_norm"])
    assert metrics["cispo_clip_ratio"] == 0.08
    assert "kl" not in metrics
    assert "clip_ratio/low_mean" not in metrics


def test_an_update_without_tokens_has_no_means():
    nothing = figures(stats=LossStats(), entropy=0.0, logp_gap=0.0)
    metrics = update_metrics([nothing], clipping="both", beta=0.0)
    assert math.isnan(metrics["entropy"])
    assert metrics["clip_ratio/low_mean"] == 0
