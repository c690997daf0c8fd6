"""Advantages from rewards.

``Rollout.advantages`` holds one number a token, and packing and the losses use each one, so credit
may differ within a rollout. ``assign_advantages`` gives all sampled tokens of a rollout the same
number, from its reward with the overlong penalty. Per-turn credit needs another function in its
place, nothing else: turn k of a rollout is the k-th run of True in ``loss_mask``, it earned
``turn_rewards[k]``, and its return is the sum of ``turn_rewards[k:]``; that return, minus its mean
over the group's k-th turns, goes to each token of the run, and 0.0 to every token between runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rlsloth.config import AdvantageConfig
from rlsloth.records import Group, Rollout

STD_EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""


def assign_advantages(groups: Sequence[Group], cfg: AdvantageConfig) -> None:
    """Fill every rollout's ``advantages`` evenly, from the rewards of its group.

    group: (r - mean) / (std + 1e-4) with the group's unbiased std (GRPO, arXiv:2402.03300, §4.1.2).
    batch: (r - group mean) / (std + 1e-4) with the unbiased std of all the step's rewards.
    none: r - mean (Dr. GRPO, arXiv:2503.20783). leave_one_out: r - mean of the rest (RLOO,
    Ahmadian et al. 2024, arXiv:2402.14740).

    Rollouts without a reward get 0 and are left out of means and deviations. A group whose rewards
    are all equal, or that has only one, gets exactly 0.0: rollouts without gradient are recognised
    by that.
    """
    batch_std = _std([reward for group in groups for reward in _rewards(group)])
    for group in groups:
        scored = _scored(group)
        rewards = [reward for _, reward in scored]
        for rollout in group.rollouts:
            _fill(rollout, 0.0)
        if _all_equal(rewards):
            continue
        mean = statistics.fmean(rewards)
        match cfg.normalize:
            case "group":
                scale = 1 / (_std(rewards) + STD_EPSILON)
            case "batch":
                scale = 1 / (batch_std + STD_EPSILON)
            case "none":
                scale = 1.0
            case "leave_one_out":
                # r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1)
                scale = len(rewards) / (len(rewards) - 1)
        for rollout, reward in scored:
            _fill(rollout, (reward - mean) * scale)


def _fill(rollout: Rollout, advantage: float) -> None:
    """Give every sampled token the same advantage."""
    rollout.advantages = [advantage if sampled else 0.0 for sampled in rollout.loss_mask]


def _scored(group: Group) -> list[tuple[Rollout, float]]:
    rewards = [(rollout, rollout.shaped_reward) for rollout in group.rollouts]
    return [(rollout, reward) for rollout, reward in rewards if reward is not None]


def _rewards(group: Group) -> list[float]:
    return [reward for _, reward in _scored(group)]


def _all_equal(rewards: Sequence[float]) -> bool:
    """Whether rewards differ by no more than rounding (0.1 + 0.2 against 0.3)."""
    return not rewards or math.isclose(min(rewards), max(rewards), rel_tol=1e-9, abs_tol=1e-12)


def _std(values: Sequence[float]) -> float:
    """Unbiased; 0 for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
