"""Reasons why the gradient of a step is zero or small, in plain words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rlsloth.records import Group, Rollout
from rlsloth.run.metrics import ZERO_STD, group_std

CLIPPED_RATIO = 0.5
"""Share of truncated completions above which a step gets a warning."""
NO_ADVANTAGE = 1e-6
"""Advantages below this are rounding errors."""


def diagnose(
    groups: Sequence[Group],
    reward_names: Sequence[str],
    mask_truncated: bool,
    cut_tail: float = 1.0,
    temperature: float = 1.0,
) -> list[str]:
    """Return one sentence for each reason why this step's gradient is zero or small.

    Args:
        groups: scored, with advantages assigned.
        reward_names: in the order of each rollout's scores.
        mask_truncated: whether truncated completions carry no loss (``loss.mask_truncated``).
        cut_tail: share of completions that sampling waits for (``rollout.cut_tail``).
        temperature: temperature of the rollouts (``rollout.temperature``).
    """
    return list(findings(groups, reward_names, mask_truncated, cut_tail, temperature).values())


def findings(
    groups: Sequence[Group],
    reward_names: Sequence[str],
    mask_truncated: bool,
    cut_tail: float,
    temperature: float,
) -> dict[str, str]:
    """Return kind of fault -> sentence for one step.

    The kind stays the same from step to step; the figures in the sentence change.
    """
    found = {}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    failures = _failures(rollouts, reward_names)
    if failures:
        found["failures"] = failures
    if unread := _rows_without_score(groups):
        found["rows without a score"] = unread
    teaching = [
        rollout
        for rollout in rollouts
        if any(abs(advantage) > NO_ADVANTAGE for advantage in rollout.advantages)
        and not (mask_truncated and rollout.truncated)
    ]
    if not teaching:
        found |= _no_gradient(groups, rollouts, reward_names, mask_truncated, temperature)
    if "truncated" not in found and (clipped := _clipped(rollouts, cut_tail)):
        found["clipped"] = clipped
    return found


def _clipped(rollouts: Sequence[Rollout], cut_tail: float) -> str:
    """A warning of truncated completions, without those that ``rollout.cut_tail`` may have cut."""
    cut = len(rollouts) - math.ceil(cut_tail * len(rollouts))
    finished, truncated = len(rollouts) - cut, sum(r.truncated for r in rollouts) - cut
    if truncated <= CLIPPED_RATIO * finished:
        return ""
    besides = f", besides {cut} that --rollout.cut-tail may have cut" if cut else ""
    return (
        f"{truncated} of {finished} completions hit the length limit{besides}: "
        "raise --rollout.max-tokens, or prompt for shorter completions"
    )


def _failures(rollouts: Sequence[Rollout], reward_names: Sequence[str]) -> str:
    parts = []
    for index, name in enumerate(reward_names):
        failed = [r.scores[index] for r in rollouts if r.scores[index].failure is not None]
        if failed:
            kinds = Counter(score.failure for score in failed)
            what = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
            detail = next((f"; e.g. {_short(s.detail)}" for s in failed if s.detail), "")
            parts.append(f"{name} on {len(failed)} of {len(rollouts)} ({what}{detail})")
    return f"rewards failed, so these completions are left out: {'; '.join(parts)}" if parts else ""


def _rows_without_score(groups: Sequence[Group]) -> str:
    """A warning of prompts to which no reward applies, while some applies to others."""
    rows = [
        group.prompt.index + 1
        for group in groups
        if all(s.value is None and s.failure is None for r in group.rollouts for s in r.scores)
    ]
    if not rows or len(rows) == len(groups):
        return ""
    named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return (
        f"{len(rows)} of {len(groups)} prompts teach nothing, since no reward applies to them (row "
        f"{named}): check their gold with `rlsloth rewards test`, or remove these rows"
    )


def _no_gradient(
    groups: Sequence[Group],
    rollouts: Sequence[Rollout],
    reward_names: Sequence[str],
    mask_truncated: bool,
    temperature: float,
) -> dict[str, str]:
    if mask_truncated and all(rollout.truncated for rollout in rollouts):
        return {
            "truncated": f"no gradient: all {len(rollouts)} completions were cut off and are "
            "masked; raise --rollout.max-tokens, or pass --loss.mask-truncated false"
        }
    if all(rollout.reward is None for rollout in rollouts):
        why = _inapplicable(rollouts, reward_names)
        return {"unscored": f"no gradient: no completion has a reward{why}"}
    if cancelled := _cancelled(groups, reward_names):
        return {"cancel": cancelled}
    if any(group_std(group) > ZERO_STD for group in groups):
        return {
            "masked": "no gradient: the only completions that differ in reward were cut off and "
            "are masked; raise --rollout.max-tokens"
        }
    if copies := _copies(groups, temperature):
        return {"copies": copies}
    return {"equal": _equal(groups, reward_names)}


def _copies(groups: Sequence[Group], temperature: float) -> str:
    """A warning of groups whose completions are all the same text."""
    if any(len({tuple(r.token_ids) for r in group.rollouts}) > 1 for group in groups):
        return ""
    start = "no gradient: all completions of each group are the same"
    if temperature == 0:
        return f"{start}: --rollout.temperature is 0, which only evaluations can use; pass 1"
    return (
        f"{start} at --rollout.temperature {temperature:g}: raise it, or continue from an earlier "
        "checkpoint, before the policy became certain"
    )


def _inapplicable(rollouts: Sequence[Rollout], reward_names: Sequence[str]) -> str:
    names = [
        name
        for index, name in enumerate(reward_names)
        if all(r.scores[index].value is None and r.scores[index].failure is None for r in rollouts)
    ]
    listed = ", ".join(names)
    return f"; {listed} applied to none (do the rows have the column it needs?)" if names else ""


def _cancelled(groups: Sequence[Group], reward_names: Sequence[str]) -> str:
    """A warning of rewards that vary within groups while their weighted sum does not."""
    varying = [
        name
        for index, name in enumerate(reward_names)
        if any(
            _spread([r.scores[index].value for r in group.rollouts]) > ZERO_STD for group in groups
        )
    ]
    if not varying or any(_spread([r.reward for r in g.rollouts]) > ZERO_STD for g in groups):
        return ""
    if len(varying) == 1:
        return (
            f"no gradient: {varying[0]} varies within groups but has no weight; "
            "change --reward.weights"
        )
    return (
        f"no gradient: {' and '.join(varying)} vary within groups but their weighted sum does not, "
        "they cancel; change --reward.weights"
    )


def _spread(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return max(known) - min(known) if known else 0.0


def _equal(groups: Sequence[Group], reward_names: Sequence[str]) -> str:
    values: Counter[float] = Counter()
    for group in groups:
        rewards = [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
        if rewards:
            values[round(float(np.mean(rewards)), 6)] += 1
    if len(values) == 1:
        value = next(iter(values))
        start = f"no gradient: every completion scored {value:g} by {' and '.join(reward_names)}"
        if value <= 0:
            return (
                f"{start}: the task is too hard, or the answer's format is not recognised; "
                "read the samples"
            )
        return f"{start}: the task is solved, or the reward is too coarse; take harder prompts"
    counts = ", ".join(f"{count} at {value:g}" for value, count in sorted(values.items()))
    return (
        f"no gradient: within each group all completions scored the same ({counts} groups); "
        "take prompts that the model solves only sometimes, or raise --group-size"
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:119] + "…"
