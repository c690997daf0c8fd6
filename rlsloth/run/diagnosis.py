"""Plain words on why a step teaches little or nothing, and on figures that drift the wrong way."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rlsloth.records import Group, Rollout
from rlsloth.run.metrics import LOGP_GAP, ZERO_STD, group_std, is_number

CLIPPED_RATIO = 0.5
"""More truncated completions than this are worth a warning."""
NO_ADVANTAGE = 1e-6
"""Advantages below this come from rounding."""
NEAR_ZERO_LOSS = 0.05

WINDOW = 10
"""Steps in a trend's beginning and in its present; nothing is said before there are two windows."""
ENTROPY_LEFT = 0.1
"""Entropy has collapsed below this share of its beginning, unless the reward rose as well."""
LENGTH_GROWTH = 2.0
"""Length runs away above this multiple of its beginning, unless the reward rose as well."""
GAP_GROWTH = 2.0
GAP_WORTH_WATCHING = 0.005
"""A rising log-prob gap is not mentioned below this (nats)."""


def diagnose(
    groups: Sequence[Group],
    reward_names: Sequence[str],
    mask_truncated: bool,
    cut_tail: float = 1.0,
) -> list[str]:
    """Why this step's gradient is zero or small; empty when nothing is wrong.

    Args:
        groups: scored, with advantages assigned.
        reward_names: in the order of each rollout's scores.
        mask_truncated: whether truncated completions carry no loss (``loss.mask_truncated``).
        cut_tail: the share of completions that may finish (``rollout.cut_tail``).
    """
    return list(_findings(groups, reward_names, mask_truncated, cut_tail).values())


def _findings(
    groups: Sequence[Group], reward_names: Sequence[str], mask_truncated: bool, cut_tail: float
) -> dict[str, str]:
    """What is wrong, by kind; the kind stays the same from step to step while the figures
    change."""
    found = {}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    failures = _failures(rollouts, reward_names)
    if failures:
        found["failures"] = failures
    teaching = [
        rollout
        for rollout in rollouts
        if any(abs(advantage) > NO_ADVANTAGE for advantage in rollout.advantages)
        and not (mask_truncated and rollout.truncated)
    ]
    if not teaching:
        found |= _no_gradient(groups, rollouts, reward_names, mask_truncated)
    if "truncated" not in found and (clipped := _clipped(rollouts, cut_tail)):
        found["clipped"] = clipped
    return found


def _clipped(rollouts: Sequence[Rollout], cut_tail: float) -> str:
    """Truncated ones beyond those that ``rollout.cut_tail`` may have cut."""
    cut = len(rollouts) - math.ceil(cut_tail * len(rollouts))
    finished, truncated = len(rollouts) - cut, sum(r.truncated for r in rollouts) - cut
    if truncated <= CLIPPED_RATIO * finished:
        return ""
    besides = f", besides {cut} that --rollout.cut-tail may have cut" if cut else ""
    return (
        f"{truncated} of {finished} completions hit the length limit{besides}: "
        "raise --rollout.max-tokens, or ask for shorter answers"
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
    return f"rewards failed, those completions teach nothing: {'; '.join(parts)}" if parts else ""


def _no_gradient(
    groups: Sequence[Group],
    rollouts: Sequence[Rollout],
    reward_names: Sequence[str],
    mask_truncated: bool,
) -> dict[str, str]:
    if mask_truncated and all(rollout.truncated for rollout in rollouts):
        return {
            "truncated": f"no gradient: all {len(rollouts)} completions were cut off and are "
            "masked; raise --rollout.max-tokens, or set --loss.mask-truncated false"
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
    return {"equal": _equal(groups)}


def _inapplicable(rollouts: Sequence[Rollout], reward_names: Sequence[str]) -> str:
    names = [
        name
        for index, name in enumerate(reward_names)
        if all(r.scores[index].value is None and r.scores[index].failure is None for r in rollouts)
    ]
    listed = ", ".join(names)
    return f"; {listed} applied to none (does the data have the column it needs?)" if names else ""


def _cancelled(groups: Sequence[Group], reward_names: Sequence[str]) -> str:
    """Rewards that vary within groups whose weighted sum does not."""
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


def _equal(groups: Sequence[Group]) -> str:
    values: Counter[float] = Counter()
    for group in groups:
        rewards = [rollout.reward for rollout in group.rollouts if rollout.reward is not None]
        if rewards:
            values[round(float(np.mean(rewards)), 6)] += 1
    if len(values) == 1:
        value = next(iter(values))
        start = f"no gradient: every completion scored {value:g}"
        if value <= 0:
            return (
                f"{start}: the task is too hard, or the answer's format is not recognised; "
                "read the samples"
            )
        return f"{start}: solved, or the reward cannot tell good from better; take harder prompts"
    counts = ", ".join(f"{count} at {value:g}" for value, count in sorted(values.items()))
    return (
        f"no gradient: within each group all completions scored the same ({counts} groups); "
        "take prompts that are solved sometimes, or a larger --group-size"
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:119] + "…"


class Episodes:
    """Gives each warning when it begins to hold, and again only after it has been clear for
    `WINDOW` steps."""

    def __init__(self) -> None:
        self._quiet: dict[str, int] = {}  # steps for which a kind of warning is not repeated

    def new(self, found: Mapping[str, str]) -> list[str]:
        """Of a step's warnings by kind, those to give now."""
        new = [text for kind, text in found.items() if kind not in self._quiet]
        self._quiet = {kind: left - 1 for kind, left in self._quiet.items() if left > 1}
        self._quiet |= dict.fromkeys(found, WINDOW)
        return new


class Watch:
    """Follows a run and gives its warnings, each once an episode.

    Trends compare the mean of the last `WINDOW` steps with that of the first `WINDOW`: entropy
    below `ENTROPY_LEFT` of its beginning, and length above `LENGTH_GROWTH` times it, each only
    while the reward has not risen; the log-prob gap above `GAP_GROWTH` times its beginning.
    """

    def __init__(
        self,
        reward_names: Sequence[str],
        mask_truncated: bool,
        history: Iterable[Mapping[str, float | None]] = (),
        cut_tail: float = 1.0,
    ) -> None:
        """``history``: rows of the steps before a resume (``Run.history``), so that trends keep
        their beginning. For the others see ``diagnose``."""
        self._names = list(reward_names)
        self._mask_truncated = mask_truncated
        self._cut_tail = cut_tail
        self._episodes = Episodes()
        self._explained = False
        names = ("reward", "entropy", "completions/mean_length", LOGP_GAP)
        self._trends = {name: _Trend() for name in names}
        for row in history:
            self._explained = self._explained or "loss" in row
            self._follow(row)

    def step(self, groups: Sequence[Group], metrics: Mapping[str, float]) -> list[str]:
        """Warnings that are new after a step; ``metrics`` are the step's own, updates included."""
        self._follow(metrics)
        found = _findings(groups, self._names, self._mask_truncated, self._cut_tail)
        return self._episodes.new(found | self._drifts())

    def _follow(self, row: Mapping[str, float | None]) -> None:
        for name, trend in self._trends.items():
            value = row.get(name)
            if is_number(value):
                trend.add(value)

    def _drifts(self) -> dict[str, str]:
        reward, entropy, length, gap = self._trends.values()
        improving = reward.ready and reward.now > reward.beginning
        found = {}
        if entropy.ready and not improving and entropy.now < ENTROPY_LEFT * entropy.beginning:
            found["entropy"] = (
                f"entropy fell from {entropy.beginning:.3g} to {entropy.now:.3g} and the reward "
                "did not rise: completions are becoming alike; lower --optim.lr, or raise "
                "--loss.epsilon-high (0.28)"
            )
        if length.ready and not improving and length.now > LENGTH_GROWTH * length.beginning:
            found["length"] = (
                f"completions grew from {length.beginning:.0f} to {length.now:.0f} tokens and "
                "the reward did not rise: check what the reward pays for in the samples"
            )
        if gap.ready and gap.now > max(GAP_GROWTH * gap.beginning, GAP_WORTH_WATCHING):
            found["gap trend"] = (
                f"the gap between trainer and sampler rises ({gap.beginning:.4f} to {gap.now:.4f} "
                "nats a token): a sign of stale weights or of numbers drifting apart"
            )
        return found

    def explain(self, metrics: Mapping[str, float]) -> list[str]:
        """Why the loss is near 0 although the run is sound; said once in a run."""
        loss, grad_norm = metrics.get("loss"), metrics.get("grad_norm")
        if self._explained or not is_number(loss) or not is_number(grad_norm):
            return []
        if grad_norm == 0 or abs(loss) > NEAR_ZERO_LOSS:
            return []
        self._explained = True
        return [
            f"the loss is near 0 ({loss:.1e}) by construction, not by fault: a group's "
            "advantages sum to 0 and the ratio is 1 on-policy; its gradient is not "
            f"(norm {grad_norm:.3g}). Watch the reward instead"
        ]


class _Trend:
    """Mean of the first and of the last WINDOW values."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._count = 0

    def add(self, value: float) -> None:
        if len(self._first) < WINDOW:
            self._first.append(value)
        self._last.append(value)
        self._count += 1

    @property
    def ready(self) -> bool:
        return self._count >= 2 * WINDOW

    @property
    def beginning(self) -> float:
        return float(np.mean(self._first))

    @property
    def now(self) -> float:
        return float(np.mean(self._last))
