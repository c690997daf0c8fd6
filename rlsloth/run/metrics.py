"""Figures of a step under TRL 1.16's metric names, so that dashboards made for TRL work.

Source of names and definitions: trl/trainer/grpo_trainer.py, release 1.16.0. Each function lists
its differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from rlsloth.records import Clipping, Group, LossStats, Rollout, StepStats

NAN = float("nan")
Floats = NDArray[np.float64]

LOGP_GAP = "sampling/sampling_logp_difference/mean"
"""The gap: mean |trainer log-prob - sampling log-prob| per trained token, in nats, with the
trainer's weights before the first update of the step."""

ZERO_STD = 1e-8
"""Largest standard deviation at which the rewards of a group count as equal (the tolerance of
torch.isclose)."""


TRAINER_METRICS = (
    "step", "step_time", "time/*", "eval_*", "num_tokens", "trained_tokens", "skipped_updates",
    "reward", "reward_std", "overlong_penalty", "frac_reward_zero_std", "rewards/*/mean",
    "rewards/*/std", "rewards/*/failures", "rewards/*/not_applicable", "rewards/*/retried_groups",
    "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/mean_terminated_length", "completions/min_terminated_length",
    "completions/max_terminated_length", "completions/clipped_ratio", "tools/call_frequency",
    "tools/failure_frequency", "loss", "policy_loss", "entropy", "kl", "importance_ratio/mean",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/mean", "sampling/corrected_ratio", "grad_norm",
    "learning_rate", "cispo_clip_ratio", "clip_ratio/low_mean", "clip_ratio/high_mean",
    "clip_ratio/region_mean",
)  # fmt: skip
"""Metric names, as shell patterns, that a reward's ``log_metric`` may not use."""


def count_tokens(groups: Sequence[Group]) -> int:
    """Tokens of a step, as TRL counts ``num_tokens``: sampled tokens, and each prompt once a
    rollout."""
    return sum(
        len(group.prompt_ids) + rollout.length for group in groups for rollout in group.rollouts
    )


def rollout_metrics(
    groups: Sequence[Group], reward_names: Sequence[str], *, num_tokens: int
) -> dict[str, float]:
    """Figures of the sampled completions and of their rewards; the groups must have been scored.

    ``reward_std`` is the standard deviation (n - 1) over all of the step's rewards, not within
    groups; ``frac_reward_zero_std`` the share of rollouts whose group has equal rewards, with the
    overlong penalty added. Lengths count sampled tokens. A figure without any value is NaN, and
    null in metrics.jsonl.

    Not in TRL: ``rewards/<name>/failures`` and ``rewards/<name>/not_applicable``, numbers of
    rollouts, and ``overlong_penalty``, the mean penalty, which is not in ``reward``.

    Args:
        groups: the step's groups.
        reward_names: in the order of each rollout's scores.
        num_tokens: tokens of the run so far, this step included (the sum of `count_tokens`).
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = _values([rollout.reward for rollout in rollouts])
    metrics = {
        "num_tokens": float(num_tokens),
        "reward": _mean(rewards),
        "reward_std": _std(rewards),
        "frac_reward_zero_std": _zero_std_share(groups),
    }
    penalties = [r.overlong_penalty for r in rollouts if r.overlong_penalty is not None]
    if penalties:
        metrics["overlong_penalty"] = _mean(_values(penalties))
    for index, name in enumerate(reward_names):
        metrics |= _reward_metrics(rollouts, index, name)
    return metrics | _length_metrics(rollouts) | _tool_metrics(groups, rollouts)


def _reward_metrics(rollouts: Sequence[Rollout], index: int, name: str) -> dict[str, float]:
    scores = [rollout.scores[index] for rollout in rollouts]
    values = _values([score.value for score in scores])
    failures = sum(score.failure is not None for score in scores)
    return {
        f"rewards/{name}/mean": _mean(values),
        f"rewards/{name}/std": _std(values),
        f"rewards/{name}/failures": float(failures),
        f"rewards/{name}/not_applicable": float(len(scores) - len(values) - failures),
    }


def _length_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    lengths = np.array([rollout.length for rollout in rollouts], dtype=np.float64)
    truncated = np.array([rollout.truncated for rollout in rollouts], dtype=bool)
    # TRL logs 0, not NaN, where nothing terminated.
    terminated = lengths[~truncated] if (~truncated).any() else np.zeros(1)
    return {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": _mean(terminated),
        "completions/min_terminated_length": float(terminated.min()),
        "completions/max_terminated_length": float(terminated.max()),
        "completions/clipped_ratio": float(truncated.mean()),
    }


def _tool_metrics(groups: Sequence[Group], rollouts: Sequence[Rollout]) -> dict[str, float]:
    if not any(group.prompt.tools for group in groups):
        return {}
    calls = sum(rollout.tool_calls for rollout in rollouts)
    failures = sum(rollout.tool_failures for rollout in rollouts)
    return {
        "tools/call_frequency": calls / len(rollouts),
        "tools/failure_frequency": failures / calls if calls else 0.0,
    }


def _zero_std_share(groups: Sequence[Group]) -> float:
    equal = [len(group.rollouts) * (group_std(group) <= ZERO_STD) for group in groups]
    return sum(equal) / sum(len(group.rollouts) for group in groups)


def group_std(group: Group) -> float:
    """Standard deviation (n - 1) of a group's rewards, with the overlong penalty added; NaN with
    fewer than two."""
    return _std(_values([rollout.shaped_reward for rollout in group.rollouts]))


def _values(items: Sequence[float | None]) -> Floats:
    return np.array([item for item in items if item is not None], dtype=np.float64)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else NAN


def _std(values: Floats) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else NAN


@dataclass(frozen=True, slots=True)
class UpdateFigures:
    """One optimizer update, summed over its micro-batches. The loop fills it in."""

    loss: float
    """The differentiated value: sum of ``LossOutput.total`` over micro-batches / normalizer."""
    normalizer: float
    """Divisor of the summed loss: the loss's own rule, one number for the whole step."""
    stats: LossStats
    """Summed over micro-batches; ``stats.tokens`` is the number of trained tokens."""
    entropy: float
    """Sum over the trained tokens, nats."""
    logp_gap: float
    """Sum of |trainer log-prob - sampling log-prob| over the trained tokens, with the trainer's
    weights before the first update."""
    logp_gap_max: float
    """Largest of these differences."""
    scored_tokens: int
    """Tokens that count for the loss, those of rollouts with zero advantage included."""
    step: StepStats


def update_metrics(
    updates: Sequence[UpdateFigures], *, clipping: Clipping, beta: float
) -> dict[str, float]:
    """Figures of the updates of one step: means over the updates, as TRL averages micro-batches.

    ``entropy``, ``kl`` and ``sampling/*`` are means over trained tokens: rollouts whose advantage
    is zero are never packed, so these means leave them out (TRL's include them). ``clip_ratio/*``
    divide by all scored tokens and so equal TRL's: a rollout with zero advantage is never clipped.
    ``grad_norm`` is the norm before clipping.

    Not in TRL: ``importance_ratio/mean``, ``sampling/corrected_ratio`` (share of tokens whose
    correction weight was truncated or masked) and ``skipped_updates``.

    Args:
        updates: at least one.
        clipping: sides on which the loss clips; a cap alone is logged under TRL's name for it,
            ``cispo_clip_ratio``.
        beta: weight of the KL term; ``kl`` is left out at 0, when no reference pass ran.
    """
    rows = [_one_update(update, clipping, beta) for update in updates]
    metrics = {name: _mean(np.array([row[name] for row in rows])) for name in rows[0]}
    metrics["sampling/sampling_logp_difference/max"] = max(
        update.logp_gap_max for update in updates
    )
    metrics["skipped_updates"] = float(sum(update.step.skipped for update in updates))
    return metrics


def _one_update(update: UpdateFigures, clipping: Clipping, beta: float) -> dict[str, float]:
    stats = update.stats
    trained = stats.tokens or NAN  # without trained tokens these figures have no value
    scored = update.scored_tokens or NAN
    row = {
        "loss": update.loss,
        "policy_loss": stats.policy / update.normalizer if update.normalizer else NAN,
        "entropy": update.entropy / trained,
        "importance_ratio/mean": stats.ratio / trained,
        LOGP_GAP: update.logp_gap / trained,
        "sampling/importance_sampling_ratio/mean": stats.correction / trained,
        "sampling/corrected_ratio": stats.corrected / trained,
        "grad_norm": update.step.grad_norm,
        "learning_rate": update.step.learning_rate,
    }
    if beta:
        row["kl"] = stats.kl / trained
    if clipping == "none":
        return row
    if clipping == "high":
        return row | {"cispo_clip_ratio": stats.clipped_high / scored}
    low, high = stats.clipped_low / scored, stats.clipped_high / scored
    return row | {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }


def is_number(value: object) -> TypeGuard[float]:
    """Whether a logged value is a finite number, and neither null nor text."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
